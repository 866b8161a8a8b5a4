"""From a prompt to an image: find adapters, fuse them, generate (AutoLoRA, 2025)."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from core_gates.adapters import RelevanceGate
from core_gates.adapters.relevance import MOST
from core_gates.errors import GatesError, check_option
from diffusion.fusion.baking import GateMap, GateRecorder, records_of
from diffusion.fusion.gated_fusion import GatedFusion, Mode
from diffusion.fusion.protocol import (
    Fusion,
    family_of,
    linear_sizes,
    refuse_misfits,
    role_of,
    uncompiled,
)
from diffusion.fusion.retrieved import Retrieved
from diffusion.library import Match
from diffusion.lora_file import LoraBundle, LoraFileError
from diffusion.models.flow_matching import GUIDANCE
from diffusion.models.text_encoders import TextEncoder

UNNAMED = "the prompt does not name it, as it does others{}: fill=True, or --fill, takes it, too"
SHRINK = 2.7  # adapters that a sum adds in full; tuned on triples of the embedded base
BROKEN = "{} are not finite: lower the strengths of the adapters, or leave one out"

Make = Callable[[nn.Module, Mapping[str, LoraBundle]], Fusion]
Roles = Callable[[Mapping[str, LoraBundle]], Mapping[str, str]]


class Library(Protocol):
    """Where adapters are found, such as `diffusion.library.LoraLibrary`."""

    def search(self, prompt: str, k: int = 3, *, whole: bool = False) -> Sequence[Match]:
        """Return the adapters that suit a prompt best, the best first; ``whole`` is for gates."""

    def similarities(self, names: Sequence[str]) -> tuple[np.ndarray, str]:
        """Return cosines of the embeddings of adapters (K, K), and the encoder's fingerprint."""

    def load(self, name: str) -> LoraBundle:
        """Read an adapter."""


@dataclass(frozen=True)
class Used:
    """An adapter that took part.

    Attributes:
        name: Of the adapter.
        strength: What it was weighed by.
        score: Of the search; None if it was named.
        role: That it was used in; None where nothing depends on it.
        open: How far a relevance gate has opened it, from 0 to 1.
    """

    name: str
    strength: float
    score: float | None = None
    role: str | None = None
    open: float | None = None


@dataclass(frozen=True)
class Generated:
    """Images, and what made them.

    Attributes:
        images: As the pipeline returns them.
        prompt: What was asked for.
        seed: Of the noise.
        mode: How the adapters were combined.
        adapters: Those that took part.
        skipped: Name -> why an adapter that was found took no part.
        gates: Mean gates by step, layer and adapter, where recorded.
        options: Of the pipeline.
    """

    images: Any
    prompt: str
    seed: int
    mode: str
    adapters: tuple[Used, ...]
    skipped: Mapping[str, str]
    gates: GateMap | None
    options: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """Return the result without its images, for `diffusion.data.pictures.save_picture`."""
        plain = {k: v for k, v in self.options.items() if isinstance(v, int | float | str)}
        return {
            "prompt": self.prompt,
            "negative_prompt": plain.pop("negative_prompt", ""),
            "seed": self.seed,
            "steps": plain.get("num_inference_steps"),
            "guidance": plain.get("true_cfg_scale", plain.get("guidance_scale")),
            "mode": self.mode,
            "adapters": [
                {"name": adapter.name, "strength": adapter.strength, "score": adapter.score}
                | ({} if adapter.role is None else {"role": adapter.role})
                | ({} if adapter.open is None else {"open": adapter.open})
                for adapter in self.adapters
            ],
            "skipped": dict(self.skipped),
            "gates": None if self.gates is None else dict(records_of(self.gates)),
            "options": plain,
        }


class AutoLoraPipeline:
    """Generate images with the adapters that suit a prompt, each weighed by its gates.

    Examples:
        >>> generate = AutoLoraPipeline(pipe, LoraLibrary("~/loras"), "gates.safetensors")
        >>> found = generate("a red heart", k=3)
        >>> found.images[0], found.adapters

    The pipeline of diffusers stays as it is: adapters are attached to its transformer for a call
    and gone after it, also after an error.

    Args:
        pipe: A ``FluxPipeline`` or ``StableDiffusion3Pipeline``.
        library: Where adapters are found; None if they are always given.
        gates: File of trained gates; without it they begin as the plain sum.
        text: Encodes prompts for the embedded base; None where the pipeline does it.
        defaults: Options of every call of the pipeline, such as ``height`` and ``width``.
    """

    def __init__(
        self,
        pipe: Any,
        library: Library | None = None,
        gates: str | Path | None = None,
        text: TextEncoder | None = None,
        **defaults: Any,
    ) -> None:
        self.pipe, self.library, self.gates, self.text = pipe, library, gates, text
        self.defaults = defaults

    @property
    def model(self) -> nn.Module:
        """The transformer, which the pipeline may call compiled."""
        return uncompiled(self.pipe.transformer)

    @property
    def family(self) -> str | None:
        """The family of the transformer; None if it is unknown."""
        return family_of(self.model)

    def __call__(
        self,
        prompt: str,
        *,
        k: int | None = None,
        fill: bool = False,
        adapters: Sequence[str] | Mapping[str, LoraBundle] | None = None,
        strengths: Mapping[str, float] | None = None,
        roles: Mapping[str, str] | Roles | None = None,
        scores: Mapping[str, float] | None = None,
        seed: int = 0,
        mode: str | Make = "gated",
        record_gates: bool = False,
        **options: Any,
    ) -> Generated:
        """Return images of a prompt.

        Args:
            prompt: What to show; adapters are found by it.
            k: Adapters to find, by default `most_of` the mode, at most 8 for ``relevance``; those
                of other models are passed over, and where all scores are low the model is alone.
            fill: Whether adapters that the prompt does not name take part where it names others.
            adapters: Names of adapters of the library, or adapters by name, instead of a search;
                none for the model alone.
            strengths: Name -> factor of an adapter before its gates; 1 by default, and `shrink` of
                the number of adapters for the sum.
            roles: Name -> role, or what returns roles for adapters; by default what tags name.
            scores: Name -> score for a switch, by default the cosine in the search; others stay on.
            seed: Of the noise; the same one gives the same pixels.
            mode: ``gated``, ``sum``, ``strengths``, or what makes a fusion, such as a rival; or
                ``relevance``, which opens adapters as far as the prompt needs them, and those that
                it names in full; the sum where all are named, or not found by their weights.
            record_gates: Whether to record mean gates by step and layer.
            options: Of the pipeline.

        Raises:
            GatesError: The prompt is empty, no adapter fits, an argument is wrong, or a pixel NaN.
        """
        if not prompt.strip():
            raise GatesError("the prompt is empty: say what the image is to show")
        k = most_of(mode) if k is None else k
        whole = {"whole": True} if mode == "relevance" else {}
        bundles, matches, skipped = self._adapters(prompt, k, adapters, whole, fill=fill)
        fusion, name, opened = self._fusion(bundles, matches, mode)
        if name == "sum" and strengths is None:
            strengths = dict.fromkeys(bundles, shrink(len(bundles)))
        if fusion is not None and strengths:
            fusion.set_strengths(strengths)
        told = _described(fusion, bundles, matches, roles, scores)
        options = self._options(options)
        images, gates = self._run(prompt, fusion, seed, record_gates, options)
        if opened or getattr(fusion, "context", None) is None:
            told = {}  # on which nothing depends
        strong = dict.fromkeys(bundles, 1.0) if fusion is None else fusion.strengths
        score = {label: float(matches[label].score) for label in bundles if label in matches}
        used = tuple(Used(n, strong[n], score.get(n), told.get(n), opened.get(n)) for n in bundles)
        return Generated(images, prompt, seed, name, used, skipped, gates, options)

    def _adapters(
        self,
        prompt: str,
        k: int,
        given: Sequence[str] | Mapping[str, LoraBundle] | None,
        more: Mapping[str, bool],
        *,
        fill: bool,
    ) -> tuple[dict[str, LoraBundle], dict[str, Match], dict[str, str]]:
        if isinstance(given, Mapping):
            return dict(given), {}, {}
        if given is not None and not given:
            return {}, {}, {}
        if self.library is None:
            raise GatesError("there is no library to find adapters in: give one, or the adapters")
        if more and isinstance(k, int) and k > MOST:
            raise GatesError(
                f"k={k}, but a gate opens at most {MOST} adapters: give {MOST} or less"
            )
        if given is not None:
            return {name: self.library.load(name) for name in given}, {}, {}
        if not isinstance(k, int) or k < 1:
            raise GatesError(f"k={k} adapters are wanted: give 1 or more, or adapters=[] for none")
        return self._search(self.library, prompt, k, more, fill=fill)

    def _retrieved(self, matches: Sequence[Match | None]) -> Retrieved | None:
        """Return what a search by weights knows of adapters; None if one was found otherwise."""
        found = [one for one in matches if one and one.weights is not None]
        every = all(one.named for one in found)  # or there is none
        if self.library is None or every or len(found) < len(matches):
            return None
        names = tuple(one.name for one in found)
        similarities, encoder = self.library.similarities(names)
        cosines = torch.tensor([[one.weights for one in found]])
        return Retrieved(names, cosines, torch.from_numpy(similarities), encoder)

    def _search(
        self, library: Library, prompt: str, k: int, more: Mapping[str, bool], *, fill: bool
    ) -> tuple[dict[str, LoraBundle], dict[str, Match], dict[str, str]]:
        """Return the best adapters that fit the model, looking further for those that do not."""
        loaded: dict[str, LoraBundle] = {}
        skipped: dict[str, str] = {}
        sizes, wanted = linear_sizes(self.model), k
        while True:
            matches = library.search(prompt, k=wanted, **more)
            for match in matches:
                if match.name in loaded or match.name in skipped:
                    continue
                try:
                    bundle = library.load(match.name)
                    refuse_misfits({match.name: bundle}, self.family, sizes)
                    loaded[match.name] = bundle
                except (GatesError, LoraFileError) as error:
                    skipped[match.name] = str(error)
            if len(loaded) >= k or len(matches) < wanted:
                break
            wanted = k + len(skipped)
        if not loaded and (skipped or not getattr(matches, "left_out", ())):
            notices = list(skipped.values())[:3] or [getattr(matches, "notice", "")]
            reasons = "; ".join(filter(None, notices)) or "the search found none of this base"
            raise GatesError(
                f"no adapter of the library fits the model: {reasons}; give the base that they were"
                " trained for"
            )
        by_name = {match.name: match for match in matches}
        names = list(loaded)[:k]
        named = [n for n in names if getattr(by_name[n], "named", "")]
        if named and not fill:
            skipped |= {n: UNNAMED.format(_cosine(by_name[n])) for n in names if n not in named}
            names = named
        return {n: loaded[n] for n in names}, by_name, skipped

    def _fusion(
        self, bundles: Mapping[str, LoraBundle], matches: Mapping[str, Match], mode: str | Make
    ) -> tuple[Fusion | None, str, dict[str, float]]:
        """Return the fusion, its mode, and how far a relevance gate opens adapters, by name."""
        model = self.model
        if not bundles:
            return None, "none", {}
        if callable(mode):
            made = mode(model, bundles)
            return made, type(made).__name__, {}
        check_option("mode", mode, get_args(Mode), GatesError)
        if mode in ("strengths", "relevance") and self.gates is None:
            raise GatesError(
                f"mode={mode!r} needs a file that was trained for it: give it as gates"
            )
        retrieved = None
        if mode == "relevance":
            retrieved = self._retrieved([matches.get(label) for label in bundles])
            mode = "sum" if retrieved is None else mode
        gates = None if mode == "sum" else self.gates
        fusion = GatedFusion(model, bundles, mode=cast(Mode, mode), gates=gates)
        if retrieved is None:
            return fusion, mode, {}
        fusion.suit(retrieved)
        gate = cast(RelevanceGate, fusion.context)
        named = torch.tensor([float(bool(matches[label].named)) for label in bundles])
        openness = torch.maximum(cast(Tensor, gate.opening()), named)
        gate.set_openness(openness)
        return fusion, mode, dict(zip(bundles, openness.flatten().tolist(), strict=True))

    def _run(
        self,
        prompt: str,
        fusion: Fusion | None,
        seed: int,
        record_gates: bool,
        options: Mapping[str, Any],
    ) -> tuple[Any, GateMap | None]:
        """Return images and gates of one call of the pipeline."""
        given = dict(options)
        if "generator" in given or "latents" in given:
            raise GatesError("the noise follows from the seed: leave generator and latents out")
        steps = int(given["num_inference_steps"])
        recorder = None
        with ExitStack() as stack:
            if fusion is not None:
                stack.enter_context(fusion)
                fusion.at(0, steps)
                if record_gates and isinstance(fusion, GatedFusion) and fusion.mode == "gated":
                    recorder = stack.enter_context(GateRecorder(fusion))
            after = _after_step(fusion, recorder, steps, given.pop("callback_on_step_end", None))
            generator = torch.Generator().manual_seed(seed)
            words = self._words(prompt, given)
            stack.enter_context(np.errstate(invalid="raise"))  # NaN pixels do not become black
            try:
                made = self.pipe(**words, **given, generator=generator, callback_on_step_end=after)
            except FloatingPointError as error:
                raise GatesError(BROKEN.format("pixels of the image")) from error
        return made.images, None if recorder is None else recorder.gates

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the pipeline is called with, what follows from the seed and prompt aside."""
        embedded = self.text is not None and self.family == "flux"
        guided = {"true_cfg_scale": GUIDANCE} if embedded else {}
        steps = inspect.signature(self.pipe.__call__).parameters["num_inference_steps"].default
        return {"num_inference_steps": int(steps), **guided, **self.defaults, **given}

    def _words(self, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return what the pipeline is told about the prompt."""
        if self.text is None:
            return {"prompt": prompt}
        right = self.text.encode([prompt])
        wrong = self.text.encode([options.pop("negative_prompt", None) or ""])
        return {
            "prompt_embeds": right.tokens,
            "pooled_prompt_embeds": right.pooled,
            "negative_prompt_embeds": wrong.tokens,
            "negative_pooled_prompt_embeds": wrong.pooled,
        }


def _described(
    fusion: Fusion | None,
    bundles: Mapping[str, LoraBundle],
    matches: Mapping[str, Match],
    roles: Mapping[str, str] | Roles | None,
    scores: Mapping[str, float] | None,
) -> dict[str, str]:
    """Return the roles of adapters; a fusion is told them and the scores."""
    given = roles(bundles) if callable(roles) else roles or {}
    told = {label: role_of(bundle) for label, bundle in bundles.items()} | dict(given)
    if fusion is not None:
        cosines = {n: matches[n].weights for n in bundles if n in matches}
        known = {n: float(c) for n, c in cosines.items() if c is not None}
        fusion.describe(roles=told, scores=known if scores is None else scores)
    return told


def most_of(mode: str | Make) -> int:
    """Return how many adapters are found for a mode by default."""
    return 6 if mode == "relevance" else 3


def shrink(count: int) -> float:
    """Return what a sum of so many adapters is multiplied by: tuned .9 for three, 1 for fewer."""
    return min(1.0, SHRINK / count) if count else 1.0


def _cosine(match: Match) -> str:
    """Return the cosine of an adapter in words; nothing where its weights were not searched."""
    return "" if match.weights is None else f" (cosine {match.weights:.2f})"


def _after_step(
    fusion: Fusion | None, recorder: GateRecorder | None, steps: int, callback: Any
) -> Callable[..., dict[str, Any]]:
    """Return what the pipeline calls after each step: the fusion learns which one follows."""

    def call(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if "latents" in tensors and not tensors["latents"].isfinite().all():
            raise GatesError(BROKEN.format(f"latents of step {step + 1} of {steps}"))
        if fusion is not None and step + 1 < steps:
            fusion.at(step + 1, steps)
        if recorder is not None:
            recorder.step = step + 1
        result: dict[str, Any] = (
            tensors if callback is None else callback(pipe, step, time, tensors)
        )
        return result

    return call
