"""Checks that a loss of stage 2 teaches no step that the chosen side takes back."""

from __future__ import annotations

from collections.abc import Sequence

from saro.config import PreferenceConfig
from saro.errors import SaroError

# Forms of pairs whose shared beginning holds, or may hold, a step that nobody should learn: the chosen side comes back from it.
_FORMS_WITH_CUE = ("mirror", "recover", "sibling")


def check_forms(options: PreferenceConfig, forms: Sequence[str | None]) -> None:
    """Check that the loss would not teach the wrong steps that some forms of pairs have before their fork.

    In a margin of sums these steps cancel. In one of averages they do not: a token of the chosen side weighs 1 / its number
    of tokens, and the same token of the rejected side 1 / that one's. The NLL of whole chosen responses has them too, and
    so has a loss on single responses.

    Args:
        forms: form of each pair to train on, as in ``PairSet.forms``.

    Raises:
        SaroError: it would.
    """
    with_cue = sorted(set(_FORMS_WITH_CUE) & set(forms))
    if not with_cue or options.scored == "divergent":
        return
    steps = f"the wrong steps that {', '.join(with_cue)} pairs have before their fork"
    if options.is_length_normalized or options.is_unpaired:
        name = "length_normalize" if options.length_normalize else f"loss {options.loss}"
        raise SaroError(f"preference.{name} would teach {steps}; take sigmoid without length_normalize")
    if options.nll:
        raise SaroError(f"preference.nll would teach {steps}; give --preference.scored divergent")
