"""Answers the requests of lm-evaluation-harness with a model of fairseq2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm
from typing_extensions import override

from moxe_plugin.eval.batching import make_batchings
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.eval.generation import GenerationOptions, generate_in_batches
from moxe_plugin.eval.response_cache import claim_response_cache
from moxe_plugin.eval.scoring import (
    Score,
    TokenCounts,
    resolve_sharing,
    score_continuations,
)
from moxe_plugin.eval.text_codec import TextCodec
from moxe_plugin.eval.windows import check_length, cut_windows
from moxe_plugin.models.captured_steps import capture_steps

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_DEFAULT_MAX_GEN_TOKS: Final = 256


class LoadedModelLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no type hints
    """Scores a loaded model for lm-evaluation-harness.

    Requests are sorted by length, padded on the right and scored in batches; batching
    changes no score. A context that is too long loses tokens on its left; a
    continuation of more than ``max_length`` tokens is an error.

    Nothing is remembered between calls. The harness' own ``--use_cache`` file does not
    tell models apart; here it is tied to the first model that uses it.

    :param loaded: The model and its tokenizer.
    :param batch_size: As in :class:`~moxe_plugin.eval.batching.Batching`.
    :param max_batch_size: As in :class:`~moxe_plugin.eval.batching.Batching`.
    :param max_length: The most tokens that the model reads at a time; the model's
        ``max_seq_len`` by default.
    :param max_gen_toks: The most tokens to generate for a task that does not say; 256
        by default, or half of ``max_length`` if that is less.
    :param prefix_token: As in :class:`~moxe_plugin.eval.text_codec.TextCodec`.
    :param add_bos_token: As in :class:`~moxe_plugin.eval.text_codec.TextCodec`. Windows
        of training data begin anywhere, so off by default.
    :param share_prefixes: Whether requests that begin alike, such as the answers to a
        question, share the computation of their beginning; see
        :func:`~moxe_plugin.eval.scoring.resolve_sharing`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        prefix_token: str | int | None = None,
        add_bos_token: bool = False,
        share_prefixes: bool | None = None,
    ) -> None:
        super().__init__()

        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.max_length = check_length(
            "max_length", max_length, default=loaded.model.max_seq_len
        )
        self.max_gen_toks = check_length(
            "max_gen_toks",
            max_gen_toks,
            default=min(_DEFAULT_MAX_GEN_TOKS, max(1, self.max_length // 2)),
        )

        self._codec = TextCodec(loaded.tokenizer, prefix_token, add_bos_token)
        self._model = loaded.model.eval()
        self._generating_model = capture_steps(self._model)
        self._batchings = make_batchings(
            batch_size,
            max_batch_size,
            vocab_size=self._codec.vocab_size,
            device=next(self._model.parameters()).device,
        )
        self._share_prefixes = resolve_sharing(loaded.model, share_prefixes)
        self._token_counts = TokenCounts(0, 0)
        self._num_target_tokens: dict[tuple[str, ...], int] = {}

    @property
    @override
    def eot_token_id(self) -> int | None:
        """The token that ends a text, if the tokenizer has one."""
        return self._codec.eos_idx

    @property
    @override
    def prefix_token_id(self) -> int:
        """The token that stands in for an empty context."""
        return self._codec.prefix_token_id

    @property
    @override
    def tokenizer_name(self) -> str:
        """What tells the harness' prompt caches of two tokenizers apart."""
        return str(self.loaded.provenance.get("tokenizer"))

    def get_model_info(self) -> dict[str, Any]:
        """Describe the model for the harness' result file.

        :returns: Plain values; the harness adds them to ``config``.
        """
        return {
            **self._describe(),
            "num_tokens_scored": self._token_counts.unshared,
            "num_tokens_computed": self._token_counts.computed,
        }

    def _describe(self) -> dict[str, Any]:
        return {
            **self.loaded.describe(),
            "max_length": self.max_length,
            "prefix_token_id": self.prefix_token_id,
            "add_bos_token": self._codec.add_bos_token,
            "share_prefixes": self._share_prefixes,
        }

    def count_target_tokens(self, request_args: tuple[str, ...]) -> int:
        """Tell how many tokens the log-likelihood of a request is the sum over.

        :param request_args: Context and continuation, or a whole text alone; as in a
            request that has been answered.

        :returns: The number of predicted tokens.
        """
        return self._num_target_tokens[request_args]

    @override
    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Accept the harness' response cache if no other model has filled it.

        :param cache_hook: Writes responses into the cache.
        """
        if cache_hook.dbdict is not None:
            settings = {**self._describe(), "tokenizer": self.tokenizer_name}
            claim_response_cache(cache_hook.dbdict, self._model, settings)

        super().set_cache_hook(cache_hook)

    @override
    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None
    ) -> list[int]:
        """Encode text.

        :param string: The text.
        :param add_special_tokens: Whether to begin with the beginning of sequence,
            unless the text does so itself; as ``add_bos_token`` says if ``None``.

        :returns: The token ids.
        """
        return self._codec.encode(string, add_bos=add_special_tokens)

    @override
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        scores: dict[int, tuple[float, bool]] = {}

        with tqdm(
            total=len(requests),
            desc="Running loglikelihood requests",
            disable=disable_tqdm or self.rank != 0,
        ) as progress:

            def on_scored(idx: int, score: Score) -> None:
                # Not our own type: the harness pickles it into its response cache.
                scores[idx] = (score.logprob, score.is_greedy)
                # Windows of a longer text have no request of their own.
                if (texts := requests[idx][0]) is not None:
                    self._num_target_tokens[texts] = len(requests[idx][2])
                    self.cache_hook.add_partial("loglikelihood", texts, scores[idx])
                progress.update(1)

            counts = score_continuations(
                self._model,
                # A context of spaces alone has moved to the continuation entirely.
                [(ctx or [self.prefix_token_id], cont) for _, ctx, cont in requests],
                max_length=self.max_length,
                batching=self._batchings.scoring,
                on_scored=on_scored,
                share_prefixes=self._share_prefixes,
            )

        self._token_counts = TokenCounts(
            self._token_counts.computed + counts.computed,
            self._token_counts.unshared + counts.unshared,
        )

        return [scores[idx] for idx in range(len(requests))]

    @override
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, cut as :func:`~moxe_plugin.eval.windows.cut_windows` does.

        :param requests: One text each.
        :param disable_tqdm: Whether to show no progress.

        :returns: The log-likelihood of each text in nats.
        """
        texts: list[str] = [request.args[0] for request in requests]
        encoded = [self.tok_encode(t, add_special_tokens=False) for t in texts]

        for text, tokens in zip(texts, encoded, strict=True):
            self._num_target_tokens[(text,)] = len(tokens)

        windows, owners = cut_windows(encoded, self.prefix_token_id, self.max_length)

        totals = [0.0] * len(texts)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)

        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob

        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)

        return totals

    @override
    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Continue prompts until a stop string, the end of the text or a limit.

        A prompt loses tokens on its left until the most tokens to generate fit behind
        it into ``max_length``.

        :param requests: A prompt and generation arguments each: ``until``,
            ``max_gen_toks`` (or a synonym), ``do_sample``, ``temperature``, ``top_k``
            and ``top_p``.
        :param disable_tqdm: Whether to show no progress.

        :returns: The generated texts, without stop strings.

        :raises ValueError: A generation argument is not known, or leaves no room for
            the prompt.
        """
        prompts = []
        for request in requests:
            text, gen_kwargs = request.args
            options = GenerationOptions.parse(gen_kwargs, self.max_gen_toks)
            prompts.append((self._encode_prompt(text, options), options))

        texts: dict[int, str] = {}

        with tqdm(
            total=len(requests),
            desc="Running generate_until requests",
            disable=disable_tqdm or self.rank != 0,
        ) as progress:

            def on_generated(idx: int, tokens: list[int]) -> None:
                texts[idx] = postprocess_generated_text(
                    self._codec.decode(tokens),
                    list(prompts[idx][1].until),
                    think_end_token=None,
                )
                self.cache_hook.add_partial(
                    "generate_until", requests[idx].args, texts[idx]
                )
                progress.update(1)

            generate_in_batches(
                self._generating_model,
                prompts,
                self._codec,
                batching=self._batchings.generating,
                on_generated=on_generated,
            )

        return [texts[idx] for idx in range(len(requests))]

    def _encode_prompt(self, text: str, options: GenerationOptions) -> list[int]:
        room = self.max_length - options.max_gen_toks

        if room < 1:
            raise ValueError(
                f"`max_gen_toks` must be less than `max_length` ({self.max_length}), "
                f"but is {options.max_gen_toks} instead."
            )

        return self.tok_encode(text)[-room:] or [self.prefix_token_id]
