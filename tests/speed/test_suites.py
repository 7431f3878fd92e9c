"""What suites list."""

from __future__ import annotations

import pytest

from moxe_plugin.speed.suites import SUITES, SuiteOptions, list_cases
from tests.models.families import get_arch

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


@pytest.mark.parametrize("size", ["340m", "small", "quickstart", "tiny"])
@pytest.mark.parametrize("suite", SUITES)
def test_every_case_is_a_registered_architecture(suite: str, size: str) -> None:
    cases = list_cases(suite, SuiteOptions(size=size))

    assert len(set(map(str, cases))) == len(cases)

    for case in cases:
        config = get_arch(case.family, case.arch)

        assert all(hasattr(config, name) for name in case.overrides)
        assert case.suite == suite

    # Others are compared with the row that comes first.
    assert (cases[0].family, cases[0].arch) == ("moxe", size)


def test_table_1_has_the_paper_s_four_models_with_and_without_optimizer() -> None:
    cases = list_cases("table1", SuiteOptions())

    assert [(c.family, c.arch, c.optimizer) for c in cases] == [
        (family, arch, optimizer)
        for optimizer in (False, True)
        for family, arch in (
            *(("moxe", "340m"), ("xlstm", "338m")),
            *(("gemma2", "356m"), ("qwen_moe", "350m")),
        )
    ]
    assert {(c.batch, c.length) for c in cases} == {(4, 256)}


def test_systems_of_transformers_are_measured_again_with_our_products() -> None:
    cases = list_cases("table1", SuiteOptions(swap_linear=True))
    own = [case for case in cases if case.linear == "own"]

    assert own == list_cases("table1", SuiteOptions())
    assert [(c.family, c.linear) for c in cases[:6]] == [
        *(("moxe", "own"), ("xlstm", "own")),
        *(("gemma2", "own"), ("gemma2", "swapped")),
        *(("qwen_moe", "own"), ("qwen_moe", "swapped")),
    ]
    assert len(cases) == 12


def test_decode_of_recurrent_models_is_measured_again_from_a_graph() -> None:
    cases = list_cases("decode", SuiteOptions(length=[256], capture_steps=True))
    plain = [case for case in cases if not case.captured]

    assert plain == list_cases("decode", SuiteOptions(length=[256]))
    assert [(c.family, c.captured) for c in cases] == [
        *(("moxe", True), ("moxe", False), ("gemma2", False)),
    ]

    others = SuiteOptions(capture_steps=True)
    assert not any(case.captured for case in list_cases("prefill", others))


@pytest.mark.parametrize(("tokens", "expected"), [(None, 8192), (16_384, 16_384)])
def test_steps_of_every_length_have_the_same_number_of_tokens(
    tokens: int | None, expected: int
) -> None:
    cases = list_cases("length", SuiteOptions(tokens=tokens))

    assert {c.batch * c.length for c in cases} == {expected}
    assert [c.length for c in cases] == [256, 512, 1024, 2048, 4096, 8192]


def test_only_the_number_of_experts_grows() -> None:
    cases = list_cases("experts", SuiteOptions())

    assert [c.overrides for c in cases] == [{"num_experts": n} for n in (8, 16, 32, 64)]
    assert len({(c.arch, c.batch, c.length) for c in cases}) == 1


def test_batches_and_lengths_of_the_user_replace_those_of_the_suite() -> None:
    cases = list_cases("decode", SuiteOptions(batch=(2, 3), length=(7,)))

    assert [(c.family, c.batch, c.length) for c in cases] == [
        (family, batch, 7) for batch in (2, 3) for family in ("moxe", "gemma2")
    ]


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("train", SuiteOptions(), "`suite` must be one of table1, .*, but is 'train'"),
        ("table1", SuiteOptions(size="7b"), "`size` must be one of .*, but is '7b'"),
        ("batch", SuiteOptions(batch=(0,)), r"`batch` must be .* 1, but is \[0\]"),
        ("length", SuiteOptions(batch=(2,)), "`batch` must not be set .* Set `tokens`"),
        (
            "length",
            SuiteOptions(tokens=300),
            r"`tokens` must be a multiple of every `length` \(256, .* 300 instead",
        ),
    ],
    ids=["suite", "size", "batch", "batch_and_tokens", "tokens"],
)
def test_mistakes_are_named(suite: str, options: SuiteOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_cases(suite, options)
