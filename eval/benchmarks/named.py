"""Layouts by their own names, for data that lies under any other: `layout:LAYOUT:PATH`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from eval.benchmarks.benchmark import RADIUS_M, Benchmark, BenchmarkError
from eval.benchmarks.folders import GROUND_TRUTH, LISTED, any_folder
from eval.benchmarks.layouts import netvlad_mat, patch_netvlad, same_names, utm_folder, vpr_bench
from eval.benchmarks.lists import GSV_CITIES, OPENVPRLAB_MSLS, OPENVPRLAB_PITTS, gsv_lists
from eval.benchmarks.msls import msls_tables, msls_test
from eval.benchmarks.sequences import nordland_seasons

Read = Callable[[str, Path], Benchmark]
ReadByRadius = Callable[[str, Path, float], Benchmark]


@dataclass(frozen=True)
class NamedLayout:
    """A layout: what is read of it, in words, and its reader, which takes a radius if it has positions."""

    expects: str
    read: Read | None = None
    read_by_radius: ReadByRadius | None = None


def stem_of(folder: Path, suffix: str) -> tuple[Path, str]:
    """The folder and what comes before `suffix` in the name of its one file that ends so.

    `folder` may be FOLDER/STEM, where there are several. Raises FileNotFoundError, or BenchmarkError naming them.
    """
    if (folder.parent / f"{folder.name}{suffix}").is_file():
        return folder.parent, folder.name
    stems = sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))
    if not stems:
        raise FileNotFoundError(f"{folder} has no *{suffix}")
    if len(stems) > 1:
        raise BenchmarkError(f"{folder} has *{suffix} of {', '.join(stems)}; name one: {folder}/{stems[0]}")
    return folder, stems[0]


def _lists(suffix: str, parts: dict[str, str]) -> Read:
    def read(name: str, folder: Path) -> Benchmark:
        root, stem = stem_of(folder, suffix)
        files = {part: root / f"{stem}_{called}.npy" for part, called in parts.items()}
        truth = files["gt"].is_file() or files["qIdx"].is_file()
        benchmark = gsv_lists(name, root, stem, "as its lists say, all queries", parts=parts, truth=truth)
        return replace(benchmark, layout=f"{stem}{suffix} and its other lists")

    return read


def _mat(name: str, folder: Path) -> Benchmark:
    root, stem = stem_of(folder / "datasets" if (folder / "datasets").is_dir() else folder, ".mat")
    return replace(netvlad_mat(name, root.parent, stem), layout=f"datasets/{stem}.mat")


def _npz(name: str, folder: Path) -> Benchmark:
    root, stem = stem_of(folder, ".npz")
    return replace(patch_netvlad(name, root, stem), layout=f"{stem}.npz")


def _msls(name: str, folder: Path, radius_m: float) -> Benchmark:
    root = folder / "train_val" if (folder / "train_val").is_dir() else folder
    cities = sorted(path.parent.parent for path in root.glob("*/query/postprocessed.csv"))
    if (root / "query/postprocessed.csv").is_file():
        cities = [root]
    if not cities:
        raise FileNotFoundError(f"{folder} has no [train_val/][CITY/]query/postprocessed.csv")
    told = ", ".join(city.name for city in cities)
    protocol = f"{radius_m:g} m radius, all queries but panoramas"
    return replace(msls_tables(name, cities, protocol, radius_m), layout=f"MSLS tables of {told}")


def _msls_test(name: str, folder: Path) -> Benchmark:
    cities = sorted(path.parent.parent.name for path in (folder / "test").glob("*/query/seq_info.csv"))
    if not cities:
        raise FileNotFoundError(f"{folder} has no test/CITY/query/seq_info.csv")
    return replace(msls_test(name, folder, cities), layout=f"MSLS test tables of {', '.join(cities)}")


def _same_names(name: str, folder: Path) -> Benchmark:
    for database, queries in (("new", "old"), ("database", "queries"), ("database", "query"), ("ref", "query")):
        if (folder / database).is_dir() and (folder / queries).is_dir():
            benchmark = same_names(name, folder, database, queries, "one to one by name, all queries")
            return replace(benchmark, layout=f"{{{database},{queries}}}, images of one place have one name")
    raise FileNotFoundError(f"{folder} has none of {{new,old}}/, {{database,queries}}/, {{ref,query}}/")


LAYOUTS: dict[str, NamedLayout] = {
    "folder": NamedLayout("what folder:PATH reads", read_by_radius=any_folder),
    "utm": NamedLayout("images/test/{database,queries}/@UTM_east@UTM_north@...@.jpg", read_by_radius=utm_folder),
    "vpr_bench": NamedLayout(f"query/, ref/, {GROUND_TRUTH}", lambda name, folder: vpr_bench(name, folder, LISTED)),
    "gsv_lists": NamedLayout(
        "STEM_{dbImages,qImages}.npy and _gt.npy, or _qIdx.npy and _pIdx.npy", _lists("_dbImages.npy", GSV_CITIES)
    ),
    "openvprlab": NamedLayout(
        "STEM_{ref_image_names,query_image_names,ground_truth_25m}.npy",
        _lists("_ref_image_names.npy", OPENVPRLAB_MSLS),
    ),
    "openvprlab_pitts": NamedLayout("STEM_{dbImages,qImages,gt_25m}.npy", _lists("_dbImages.npy", OPENVPRLAB_PITTS)),
    "netvlad_mat": NamedLayout("datasets/STEM.mat with dbStruct", _mat),
    "patch_netvlad": NamedLayout("STEM.npz, STEM_imageNames_{index,query}.txt", _npz),
    "msls": NamedLayout("[train_val/]CITY/{query,database}/{images/,postprocessed.csv,raw.csv}", read_by_radius=_msls),
    "msls_test": NamedLayout("test/CITY/{query,database}/{images/,seq_info.csv,subtask_index.csv}", _msls_test),
    "same_names": NamedLayout("{new,old}/ or {database,queries}/ with images of the same names", _same_names),
    "nordland_seasons": NamedLayout("{summer,winter}/ with frames of the same names, +-10 frames", nordland_seasons),
}


def read_layout(layout: str, name: str, folder: Path, radius_m: float | None = None) -> Benchmark:
    """The benchmark that lies in `folder` in the layout of that name.

    Raises FileNotFoundError saying what the folder lacks, ValueError for a radius where ground truth is listed.
    """
    kind = LAYOUTS[layout]
    try:
        if kind.read_by_radius:
            benchmark = kind.read_by_radius(name, folder, radius_m or RADIUS_M)
        elif kind.read and radius_m is None:
            benchmark = kind.read(name, folder)
        else:
            raise ValueError(f"layout {layout} lists its ground truth; a radius of {radius_m:g} m means nothing to it")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"layout {layout} expects {kind.expects}: {error}") from error
    return benchmark if benchmark.layout else replace(benchmark, layout=kind.expects)
