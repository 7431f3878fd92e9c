"""Tests of moxe_plugin/doctor/."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moxe_plugin.doctor import checks, command, probes
from moxe_plugin.doctor.checks import Check
from moxe_plugin.doctor.probes import Shortcoming, probe_native
from moxe_plugin.nn import products
from moxe_plugin.nn.native import library


def test_this_installation_passes(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moxe_plugin.doctor", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    report = json.loads(result.stdout)
    assert [c for c in report["checks"] if not c["passed"]] == []
    assert report["passed"]
    assert result.returncode == 0


_CRASHING_PROBES = """
import os, sys
for name in sys.argv[1:]:
    if name == "extension":
        raise OSError("no library") from KeyError("cause")
    if name == "lm_eval":
        os.abort()
    print("a library talks")
    if name == "native":
        print("moxe_plugin.doctor warns: it is slow", flush=True)
        continue
    print("moxe_plugin.doctor: found", name, flush=True)
"""


def test_a_failed_probe_does_not_hide_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "probes.py"
    script.write_text(_CRASHING_PROBES)
    monkeypatch.setattr(checks, "_PROBES_COMMAND", (sys.executable, str(script)))

    device, extension, cache, native, lm_eval = checks.check_probes()

    assert (device.passed, device.finding) == (True, "found device")
    assert not extension.passed
    assert extension.finding == "KeyError: 'cause'; then OSError: no library"
    assert (cache.passed, cache.finding) == (True, "found cache")
    assert (native.passed, native.warns, native.finding) == (True, True, "it is slow")
    assert not cache.warns
    assert (lm_eval.passed, lm_eval.finding) == (False, "the process died")


def test_versions_are_compared_with_what_fairseq2_pins() -> None:
    check = checks.check_version("fairseq2n")

    assert check.passed
    assert "==" in check.finding


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_REQUIRING", ())

    check = checks.check_version("no-such-distribution")

    assert not check.passed
    assert check.finding.startswith("not installed")
    assert check.remedy == "Run `pip install 'no-such-distribution'`."


def test_libsndfile_is_linked_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_libsndfile", lambda: None)
    monkeypatch.setattr(checks, "link_libsndfile", lambda: "/lib/libsndfile.so.1")

    assert not checks.check_libsndfile(fix=False).passed
    assert "moxe doctor --fix" in checks.check_libsndfile(fix=False).remedy
    assert checks.check_libsndfile(fix=True).passed


@pytest.mark.parametrize("passed", [True, False], ids=["passed", "failed"])
def test_exit_code_and_the_way_out(
    passed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_checks(*, fix: bool) -> Iterator[Check]:
        assert fix
        yield Check(name="[a]", passed=passed, finding="1 < 2", remedy="Upgrade a.")
        yield Check(name="b", passed=True, finding="fine", remedy="")

    monkeypatch.setattr(command, "run_checks", run_checks)

    assert command.main(["--fix"]) == (0 if passed else 1)

    output = capsys.readouterr().out
    assert "1 < 2" in output
    assert "fine" in output
    assert ("-> Upgrade a." in output) is not passed


def test_a_warning_is_shown_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_checks(**_: object) -> Iterator[Check]:
        yield Check(name="a", passed=True, finding="slow", remedy="", warns=True)

    monkeypatch.setattr(command, "run_checks", run_checks)

    assert command.main([]) == 0
    assert capsys.readouterr().out.split() == ["warn", "a", "slow"]

    assert command.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"][0]["warns"]


@pytest.mark.parametrize(
    ("product_obstacle", "obstacles", "finding"),
    [
        (
            None,
            {},
            "C++: sLSTM, convolution, norms, gates, router, dispatch, loss, "
            "float32 products, mLSTM, bfloat16 products",
        ),
        (
            "they need AVX512",
            {},
            "C++: sLSTM, convolution, norms, gates, router, dispatch, loss; "
            "torch: float32 products, mLSTM, bfloat16 products "
            "(they need AVX512)",
        ),
        (
            "bfloat16",
            {},
            "C++: sLSTM, convolution, norms, gates, router, dispatch, loss, "
            "float32 products, mLSTM; torch: bfloat16 products "
            "(torch uses the processor's AMX)",
        ),
        (
            None,
            {"causal_conv": "'g++' failed:\n  line 1"},
            "C++: sLSTM, norms, gates, router, dispatch, loss, float32 products, "
            "mLSTM, bfloat16 products; torch: convolution ('g++' failed: line 1)",
        ),
    ],
    ids=["all", "products", "bfloat16", "convolution"],
)
def test_what_runs_in_cpp_is_told_with_the_reason(
    product_obstacle: str | None,
    obstacles: dict[str, str],
    finding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = product_obstacle != "bfloat16"
    reason = product_obstacle if rounds else None
    monkeypatch.setattr(products, "why_torch", lambda: reason)
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: rounds)
    monkeypatch.setattr(library, "why_not_loaded", obstacles.get)

    assert probe_native() == finding
    assert not isinstance(probe_native(), Shortcoming)


def test_a_missing_compiler_is_a_shortcoming_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "there is no C++ compiler 'g++'\n(install g++, or set CXX)"
    monkeypatch.setattr(products, "why_torch", lambda: reason)
    monkeypatch.setattr(library, "why_not_loaded", lambda _: reason)

    probes.main(["native"])

    assert capsys.readouterr().out == (
        "moxe_plugin.doctor warns: no C++, which is slow on a CPU: there is no C++ "
        "compiler 'g++' (install g++, or set CXX)\n"
    )


def test_a_wrong_choice_of_products_fails_with_or_without_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOXE_PRODUCTS", "mkl")
    monkeypatch.setattr(library, "why_not_loaded", lambda _: "no compiler")
    products.why_torch.cache_clear()

    # Errors are not kept.
    with pytest.raises(ValueError, match="`MOXE_PRODUCTS` must be one of auto, "):
        probe_native()
