"""The known benchmarks: where each is had, in which layouts it is read, how large it is, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from configs.names import nearest
from eval.benchmarks import msls
from eval.benchmarks.benchmark import RADIUS_M, Benchmark, BenchmarkError
from eval.benchmarks.layouts import netvlad_mat, patch_netvlad, same_names, utm_folder, vpr_bench
from eval.benchmarks.lists import OPENVPRLAB_PITTS, gsv_lists
from eval.benchmarks.sequences import NORDLAND_FRAMES, gardens_point, nordland_seasons

DOWNLOADER = "github.com/gmberton/VPR-datasets-downloader"
VPR_BENCH = "github.com/MubarizZaffar/VPR-Bench"
MSLS_TEST = "{query,database}/{images/,seq_info.csv,subtask_index.csv}"
UTM = "images/test/{database,queries}/@UTM_east@UTM_north@...@.jpg"
ONE_TO_ONE = "one to one, all queries"


@dataclass(frozen=True)
class Layout:
    """One way a benchmark is distributed: the path that tells it, and its reader (name, folder) -> Benchmark."""

    marker: str
    expects: str
    read: Callable[[str, Path], Benchmark]


@dataclass(frozen=True)
class Variant:
    """A protocol of a benchmark: its layouts, first match wins, and how many images and queries it must have."""

    layouts: tuple[Layout, ...]
    counts: tuple[int, int] | None = None
    """Database images and queries; anything else is refused, for its recall would not be comparable."""
    published: bool = True
    """Whether the counts were read where the data set is published; others earn a note, not a refusal."""

    def read(self, name: str, folder: Path) -> Benchmark:
        """The benchmark in `folder`. Raises FileNotFoundError naming the layouts, BenchmarkError on wrong counts."""
        layout = self.found(folder)
        if layout is None:
            wanted = " | ".join(layout.expects for layout in self.layouts)
            raise FileNotFoundError(
                f"benchmark {name}: {folder} has none of its layouts; expected {wanted} (folder:PATH and "
                "layout:LAYOUT:PATH read other ones)"
            )
        benchmark = replace(layout.read(name, folder), layout=layout.expects)
        counts = len(benchmark.database), len(benchmark.queries)
        if self.counts and counts != self.counts:
            if not self.published:
                note = f"{counts[0]} database images and {counts[1]} queries where {self.counts} are known"
                return replace(benchmark, notes=(*benchmark.notes, note))
            raise BenchmarkError(
                f"benchmark {name}: {folder} holds {counts[0]} database images and {counts[1]} queries; its protocol "
                f"has {self.counts[0]} and {self.counts[1]} (folder:PATH runs any folder as it is)"
            )
        return benchmark

    def found(self, folder: Path) -> Layout | None:
        """The layout that the folder has."""
        return next((layout for layout in self.layouts if any(folder.glob(layout.marker))), None)


@dataclass(frozen=True)
class Entry:
    """A data set with its variants, the first being the default; `every` names those that the bare name stands for."""

    what: str
    source: str
    variants: dict[str, Variant]
    every: tuple[str, ...] = ("",)
    fault: str = ""
    custom: Callable[[Path, list[str]], list[Benchmark]] | None = None

    def check(self, name: str, options: list[str]) -> None:
        """Raises ValueError for options that name no variant, whatever is on the disk."""
        known = [variant for variant in self.variants if variant]
        if self.custom or not options or (len(options) == 1 and options[0] in known):
            return
        given = "/".join(options)
        if not known:
            raise ValueError(f"benchmark {name} takes no options, got {given!r}")
        raise ValueError(f"benchmark {name}: unknown variant {given!r}; {nearest(given, known)}")

    def load(self, name: str, folder: Path, options: list[str]) -> list[Benchmark]:
        """The benchmarks that a spec's options name."""
        if self.custom:
            return self.custom(folder, options)
        self.check(name, options)
        chosen = options or list(self.every)
        return [self.variants[key].read(f"{name}/{key}" if key else name, folder) for key in chosen]


def _utm(
    protocol: str | None = None, *, base: str = "images/test", database: str = "database", queries: str = "queries"
) -> Layout:
    """The folder convention; `protocol` where 25 m stand for something else."""

    def read(name: str, folder: Path) -> Benchmark:
        benchmark = utm_folder(name, folder, RADIUS_M, base=base, database=database, queries=queries)
        return replace(benchmark, protocol=protocol) if protocol else benchmark

    expects = f"{base}/{{{database},{queries}}}/@UTM_east@UTM_north@...@.jpg"
    return Layout(f"{base}/{queries}", expects, read)


def _vpr_bench(protocol: str) -> Layout:
    return Layout(
        "ground_truth_new.npy",
        "query/, ref/, ground_truth_new.npy",
        lambda name, folder: vpr_bench(name, folder, protocol),
    )


def _lists(stem: str, protocol: str, *, unleak: bool = False) -> Layout:
    return Layout(
        f"{stem}_dbImages.npy",
        f"{stem}_{{dbImages,qImages,gt}}.npy",
        lambda name, folder: gsv_lists(name, folder, stem, protocol, unleak=unleak),
    )


def _pitts_lists(stem: str) -> tuple[Layout, Layout]:
    """gsv-cities' lists of a Pittsburgh set and OpenVPRLab's, which differ in the name of the ground truth."""
    protocol = "25 m radius, all queries"
    openvprlab = Layout(
        f"{stem}_gt_25m.npy",
        f"{stem}_{{dbImages,qImages,gt_25m}}.npy",
        lambda name, folder: gsv_lists(name, folder, stem, protocol, parts=OPENVPRLAB_PITTS),
    )
    return replace(_lists(stem, protocol), marker=f"{stem}_gt.npy"), openvprlab


def _msls_city(city: str) -> Variant:
    def read(name: str, folder: Path) -> Benchmark:
        return msls.msls_test(name, folder, [city])

    return Variant((Layout(f"test/{city}", f"test/{city}/{MSLS_TEST}", read),))


def _mat(stem: str) -> Layout:
    return Layout(f"datasets/{stem}.mat", f"datasets/{stem}.mat", lambda name, folder: netvlad_mat(name, folder, stem))


def _npz(stem: str) -> Layout:
    lists = stem.removesuffix("_test")
    return Layout(
        f"{stem}.npz",
        f"{stem}.npz, {lists}_imageNames_{{index,query}}.txt",
        lambda name, folder: patch_netvlad(name, folder, stem),
    )


def _gardens(_name: str, folder: Path) -> Benchmark:
    return gardens_point(folder, ["day_right", "night_right"])[0]


_SVOX_QUERIES = {"night": 823, "rain": 937, "snow": 870, "sun": 854, "overcast": 872}

CATALOGUE: dict[str, Entry] = {
    "town": Entry("the rendered town of the demo", "rerankvpr demo", {"": Variant((_utm(),))}),
    "msls_val": Entry(
        "Mapillary Street-Level Sequences, validation; bare: 740 queries, /11k: all but panoramas",
        "mapillary.com/dataset/places; lists: github.com/amaralibey/gsv-cities",
        {
            "": Variant(
                (
                    Layout(
                        "msls_val_qIdx.npy",
                        "train_val/{cph,sf}/, msls_val_{dbImages,qImages,qIdx,pIdx}.npy",
                        msls.msls_740,
                    ),
                    Layout(
                        "msls_val_ref_image_names.npy",
                        "{cph,sf}/, msls_val_{ref_image_names,query_image_names,ground_truth_25m}.npy",
                        msls.msls_openvprlab,
                    ),
                ),
                (18_871, 740),
            ),
            "11k": Variant(
                (
                    Layout(
                        "train_val/*/query/raw.csv",
                        "train_val/{cph,sf}/{query,database}/{images/,postprocessed.csv,raw.csv}",
                        msls.msls_11k,
                    ),
                    _utm(msls.PROTOCOL_11K, base="images/val"),
                    _utm(msls.PROTOCOL_11K, base="val"),
                    _utm(msls.PROTOCOL_11K),
                ),
            ),
        },
        fault="qImages lists 747 queries, of which 740 count; the two protocols differ by 3 to 5 points",
    ),
    "msls_test": Entry(
        "the same, test: the contest, whose ground truth is kept back; bare: six cities, /CITY: one",
        "mapillary.com/dataset/places; predictions are written for its server",
        {
            "": Variant(
                (
                    Layout("test/*/query/seq_info.csv", f"test/CITY/{MSLS_TEST}", msls.msls_test),
                    Layout("msls_test_dbImages.npy", "msls_test_{dbImages,qImages}.npy", msls.msls_test_lists),
                ),
                (38_770, 27_092),
                published=False,
            ),
            **{city: _msls_city(city) for city in msls.TEST_CITIES},
        },
    ),
    "tokyo247": Entry(
        "Tokyo 24/7",
        f"ok.ctrl.titech.ac.jp/~torii/project/247 on request, {DOWNLOADER}",
        {"": Variant((_utm(), _mat("tokyo247"), _npz("tokyo247")), (75_984, 315))},
        fault="VPR-Bench's 315 queries have another, smaller database and are not comparable",
    ),
    "pitts30k": Entry(
        "Pittsburgh 30k; bare: test, /val",
        f"on request from the authors of NetVLAD, {DOWNLOADER}",
        {
            "": Variant(
                (_utm(), _mat("pitts30k_test"), _npz("pitts30k_test"), *_pitts_lists("pitts30k_test")), (10_000, 6_816)
            ),
            "val": Variant(
                (_utm(base="images/val"), _mat("pitts30k_val"), _npz("pitts30k_val"), *_pitts_lists("pitts30k_val")),
                (10_000, 7_608),
            ),
        },
        fault="secondary tables swap its columns with Pittsburgh 250k's",
    ),
    "pitts250k": Entry(
        "Pittsburgh 250k, test",
        f"on request from the authors of NetVLAD, {DOWNLOADER}",
        {
            "": Variant(
                (_utm(), _mat("pitts250k_test"), _npz("pitts250k_test"), *_pitts_lists("pitts250k_test")),
                (83_952, 8_280),
                published=False,
            )
        },
    ),
    "nordland": Entry(
        "Nordland; bare: 2,760 queries at +-1 frame, /full: 27,592 at +-10",
        f"{VPR_BENCH}; full: {DOWNLOADER}",
        {
            "": Variant(
                (
                    _lists("Nordland", "2,760 queries, +-1 frame"),
                    _vpr_bench("2,760 queries, +-1 frame"),
                ),
                (NORDLAND_FRAMES, 2_760),
            ),
            "full": Variant(
                (
                    _utm("27,592 queries, +-10 frames (as 25 m)"),
                    Layout("summer", "{summer,winter}/*.png, cleanImageNames.txt", nordland_seasons),
                ),
                (NORDLAND_FRAMES, NORDLAND_FRAMES),
            ),
        },
        fault="three protocols are in use; Patch-NetVLAD's positions mean +-7 frames and are not read",
    ),
    "st_lucia": Entry(
        "St Lucia, first and last drive",
        DOWNLOADER,
        {"": Variant((_utm(), _lists("stlucia", "25 m radius, all queries", unleak=True)), (1_549, 1_464))},
        fault="a list in use puts all 1,464 queries into the database; they are left out of it",
    ),
    "gardens_point": Entry(
        "Gardens Point Walking; bare: three pairs of traverses, /all: six, /DATABASE/QUERY: one; /FIRST-LAST frames",
        "doi.org/10.5281/zenodo.4590133",
        {"": Variant((Layout("night_right", "{day_left,day_right,night_right}/*.jpg, 200 each", _gardens),))},
        fault="the published ground truth names frames 200 and 201 of 200; they are left out",
        custom=gardens_point,
    ),
    "svox": Entry(
        "SVOX; bare: night, rain, snow, sun and overcast, or one of them",
        DOWNLOADER,
        {
            weather: Variant(
                (_utm(database="gallery", queries=f"queries_{weather}"),), (17_166, queries), published=False
            )
            for weather, queries in _SVOX_QUERIES.items()
        },
        every=tuple(_SVOX_QUERIES),
    ),
    "amstertime": Entry(
        "AmsterTime, archive photographs as queries",
        f"data.4tu.nl (AmsterTime v1.0), {DOWNLOADER}",
        {
            "": Variant(
                (
                    _utm(ONE_TO_ONE),
                    Layout(
                        "new", "{new,old}/ID.*", lambda name, folder: same_names(name, folder, "new", "old", ONE_TO_ONE)
                    ),
                ),
                (1_231, 1_231),
            )
        },
    ),
    "17places": Entry(
        "17 Places, indoors",
        VPR_BENCH,
        {"": Variant((_vpr_bench("+-2 frames, VPR-Bench's list"),), (406, 406))},
        fault="the published ground truth names images past the end; they are left out",
    ),
    "corridor": Entry(
        "Corridor, indoors; its images lie in that repository",
        f"{VPR_BENCH}, datasets/corridor",
        {"": Variant((_vpr_bench("+-2 frames, VPR-Bench's list"),), (111, 111))},
    ),
    "essex3in1": Entry(
        "ESSEX3IN1",
        VPR_BENCH,
        {"": Variant((_lists("ESSEX", ONE_TO_ONE), _vpr_bench(ONE_TO_ONE)), (210, 210))},
    ),
    "eynsham": Entry(
        "Eynsham, two laps, five tiles a panorama", DOWNLOADER, {"": Variant((_utm(),), (23_935, 23_935))}
    ),
    "sped": Entry(
        "SPED test",
        f"{VPR_BENCH}, {DOWNLOADER}",
        {"": Variant((_lists("SPED", ONE_TO_ONE), _vpr_bench(ONE_TO_ONE), _utm(ONE_TO_ONE)), (607, 607))},
    ),
}


ALIASES = {"msls_challenge": "msls_test", "msls-val": "msls_val", "pitts30k-val": "pitts30k/val"}
"""Other names in use, each of a folder that may have that name too."""
