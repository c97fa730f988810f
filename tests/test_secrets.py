"""Addresses without their secrets: by hypothesis over passwords, in streams, and in `ps`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from configs.load import recipe_text
from configs.schema import Recipe
from configs.secrets import without_secrets

ROOT = Path(__file__).resolve().parent.parent
CANARY = "c4naryS3cret"
# Between marks that no cleaned text may keep: quotes, spaces, slashes, all that a person may have in a password.
ODD = st.text(st.sampled_from("'\"/ @:?#&=\\%;,.)(<>[]{}|`~!$^*+-_aB3é"), max_size=6)


def password(parts: tuple[str, str]) -> str:
    return f"{parts[0]}{CANARY}{parts[1]}"


@given(st.tuples(ODD, ODD), st.sampled_from(["http", "https", "postgresql+psycopg2", "s3", "mysql"]))
@example(("p'w", ""), "http")
@example(('p"', "x/y"), "http")
@example(("a b", " c"), "http")
@example(("12/", ""), "http")
@example(("x@y/", "@"), "http")
def test_no_password_is_left_of_an_address(parts: tuple[str, str], scheme: str) -> None:
    address = f"{scheme}://ann:{password(parts)}@host:5000/path"
    shown = without_secrets(address, remembered=False)
    assert CANARY not in shown
    assert shown.startswith(f"{scheme}://")
    recipe = Recipe.model_validate({"tracking": {"uri": address}, "data": {"mix": {address: 1}}})
    assert CANARY not in recipe_text(recipe)


@given(st.tuples(ODD, ODD))
def test_no_query_is_left_of_an_address(parts: tuple[str, str]) -> None:
    address = f"http://host:80/set?token={password(parts)}"
    assert CANARY not in without_secrets(address, is_address=True, remembered=False)
    assert CANARY not in recipe_text(Recipe.model_validate({"data": {"shards": address}}))


SIMPLE = st.text(st.sampled_from("'\"/@:#&=%.)(-_aB3é"), max_size=4)


@given(st.tuples(SIMPLE, SIMPLE))
def test_no_password_is_left_of_an_address_in_a_text(parts: tuple[str, str]) -> None:
    text = f"cannot reach 'http://ann:{password(parts)}@host:5000/path?key={CANARY}' (refused): try again"
    shown = without_secrets(text, remembered=False)
    assert CANARY not in shown
    assert shown.startswith("cannot reach 'http://")
    assert shown.endswith("(refused): try again")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ann:p@ss@host:5432/db?sslmode=x", "postgresql://host:5432/db"),
        ("https://host/set?token=abc and s3://bucket/a@b", "https://host/set and s3://bucket/a@b"),
        ("sqlite:////tmp/a:b@c/mlflow.db", "sqlite:////tmp/a:b@c/mlflow.db"),
        ("http://h:5000 does not answer; ask a@b.org today", "http://h:5000 does not answer; ask a@b.org today"),
        ("http://127.0.0.1:8000/sets/@0543@.tar", "http://127.0.0.1:8000/sets/@0543@.tar"),
        ("http://[::1]:5000/x", "http://[::1]:5000/x"),
        ("http://ann:pw@[::1]:5000/x", "http://[::1]:5000/x"),
        ("read http://ann:p w@host/x: refused", "read http://host/x: refused"),
        ("s3://bucket/@0543@.tar", "s3://bucket/@0543@.tar"),
        ("Max retries exceeded with url: /x?token=abc (Caused by", "Max retries exceeded with url: /x (Caused by"),
        ("http://host/x?mail=a:b@c", "http://host/x"),
        ("is it there? no: http://h/x", "is it there? no: http://h/x"),
        ("a://b://pw@host/x", "a://host/x"),
        ("http://ann:pw@a/x\nhttp://bob:pw@b/y", "http://a/x\nhttp://b/y"),
        ("no address", "no address"),
        ("at http://ann:pw@h/#/1?workflowType=machine_learning.", "at http://h/#/1?workflowType=machine_learning."),
        ("http://h/#/1?workflowType=machine_learning&key=abc", "http://h/#/1"),
    ],
)
def test_what_is_no_secret_stays(text: str, shown: str) -> None:
    assert without_secrets(text, remembered=False) == shown


def test_a_part_of_a_password_alone_is_known() -> None:
    without_secrets("http://ann:s3cretWord/x@host")
    assert without_secrets("port could not be cast to integer value as 's3cretWord'").endswith("as '***'")


CODE = """
import sys, warnings, logging, threading
from configs.secrets import clean_streams
clean_streams()
address = "http://ann:{0}'/x@host/set?token={0}"
print("stdout", address)
print("stderr", address, file=sys.stderr)
logging.warning("logging %s", address)
warnings.warn("warning " + address)
thread = threading.Thread(target=lambda: open(address))
thread.start(); thread.join()
raise ValueError("traceback " + address)
"""


def test_nothing_printed_holds_a_secret() -> None:
    code = CODE.format(CANARY)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    for what in (
        "stdout http://host/set",
        "stderr http://host/set",
        "logging http://",
        "warning http://",
        "traceback http://",
    ):
        assert what in said
    assert CANARY not in said
    assert "FileNotFoundError" in said


@pytest.mark.slow
def test_secrets_are_not_in_ps(tmp_path: Path) -> None:
    """A launch of two ranks: the command lines of all processes, from the first to the ranks, while they wait."""
    address = f"http://ann:{CANARY}'x@10.255.255.1/set"  # which nobody answers
    recipe = tmp_path / "recipe.yaml"
    model = {"backbone": "tiny14", "weights": "random"}  # nothing to download
    recipe.write_text(yaml.safe_dump({"output": str(tmp_path / "run"), "model": model, "tracking": {"enabled": False}}))
    command = [sys.executable, "-m", "rerankvpr", "launch", "--nproc-per-node", "2", "--", "train", str(recipe)]
    command += ["--data.shards", address, "--data.remote-retry-s", "30"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    top, seen, deadline = psutil.Process(process.pid), set(), time.monotonic() + 120
    try:
        time.sleep(0.5)  # its first instant, in which it starts itself again
        while len(seen) < 3 and time.monotonic() < deadline and process.poll() is None:
            for one in [top, *top.children(recursive=True)]:
                try:
                    words = " ".join(one.cmdline())
                except psutil.Error:
                    continue
                assert CANARY not in words
                if "data.shards" in words:
                    seen.add(one.pid)
            time.sleep(0.05)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            for one in [*top.children(recursive=True), top]:
                one.kill()
        said, _ = process.communicate()
    assert len(seen) == 3, said
    assert CANARY not in said
