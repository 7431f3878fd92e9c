"""What the configurations of all families must fulfil alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args, get_origin, get_type_hints

from fairseq2.utils.validation import ValidationResult


def check_counts(
    config: object, names: Sequence[str], result: ValidationResult
) -> None:
    """Check that fields are at least 1.

    :param config: The configuration.
    :param names: The fields.
    :param result: Gets an error for each that is not.
    """
    for name in names:
        value = getattr(config, name)

        if value < 1:
            result.add_error(
                f"`{name}` must be greater than or equal to 1, but is {value} instead."
            )


def check_scales(
    config: object, names: Sequence[str], result: ValidationResult
) -> None:
    """Check that fields are finite and not negative.

    :param config: The configuration.
    :param names: The fields.
    :param result: Gets an error for each that is not.
    """
    for name in names:
        value = getattr(config, name)

        # Whatever is compared with NaN is false.
        if not 0.0 <= value < math.inf:
            result.add_error(
                f"`{name}` must be greater than or equal to 0 and finite, but is "
                f"{value} instead."
            )


def check_factors(
    config: object, names: Sequence[str], model_dim: int, result: ValidationResult
) -> bool:
    """Check that fields can be multiplied with the model's dimensionality.

    :param config: The configuration.
    :param names: The fields.
    :param model_dim: The dimensionality.
    :param result: Gets an error for each that is not finite or not positive.

    :returns: Whether there is none.
    """
    is_valid = True

    for name in names:
        value = getattr(config, name)

        if not (value > 0.0 and math.isfinite(value * model_dim)):
            is_valid = False

            result.add_error(
                f"`{name}` must be greater than 0 and finite, but is {value} instead."
            )

    return is_valid


def check_vocabulary(config: object, result: ValidationResult) -> None:
    """Check the size of the vocabulary, and the padding token.

    :param config: The configuration; it has ``vocab_size`` and ``pad_idx``.
    :param result: Gets the errors.
    """
    check_counts(config, ["vocab_size"], result)

    vocab_size, pad_idx = (getattr(config, n) for n in ("vocab_size", "pad_idx"))

    if pad_idx is not None and not 0 <= pad_idx < vocab_size:
        result.add_error(
            f"`pad_idx` must be between 0 and `vocab_size` - 1 ({vocab_size - 1}), or "
            f"null if the vocabulary has no padding token, but is {pad_idx} instead."
        )


def check_choices(config: object, result: ValidationResult) -> None:
    """Check that fields of literal types, or lists of such, have values of these.

    :param config: The configuration.
    :param result: Gets an error for each that has not.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)

        if get_origin(hint) is list:
            (hint,) = get_args(hint)
            values = list(value)
        else:
            values = [value]

        if get_origin(hint) is not Literal:
            continue

        choices = get_args(hint)

        for unknown in [v for v in values if v not in choices]:
            result.add_error(
                f"`{name}` must be one of {', '.join(choices)}, but is {unknown!r} "
                "instead."
            )
