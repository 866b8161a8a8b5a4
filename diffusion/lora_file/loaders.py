"""What other programs make of a dialect: which of them ignore a file, and which refuse it."""

from typing import Literal, NamedTuple

from diffusion.lora_file.report import Dialect, Fate, MappingReport

DIFFUSERS = "diffusers 0.42.1"
Effect = Literal["nothing", "part", "error"]


class Rule(NamedTuple):
    """A dialect that a loader does not read as it should; empty conditions hold for all.

    Attributes:
        loader: Program and version in which it was measured.
        effect: ``nothing``: it runs and the image is as without the file; ``part``: some layers are
            left out or scaled differently; ``error``: it raises.
        what: In a few words.
        families: Of models.
        prefixes: Of names.
        names: Tables of names of layers.
        factors: Starts of spellings of factors.
        kinds: Of factors.
        modules: diffusers names of layers.
    """

    loader: str
    effect: Effect
    what: str
    families: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def holds(self, family: str, fate: Fate, dialect: Dialect) -> bool:
        """Return whether a tensor is one of those that the rule is about."""
        return (
            (not self.families or family in self.families)
            and (not self.prefixes or dialect.prefix in self.prefixes)
            and (not self.names or dialect.names in self.names)
            and (not self.factors or dialect.factors.startswith(self.factors))
            and (not self.kinds or dialect.kind in self.kinds)
            and (not self.modules or bool({*self.modules} & {*fate.modules}))
        )


_OUTER = (
    "x_embedder",
    "context_embedder",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.guidance_embedder.linear_1",
    "time_text_embed.guidance_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2",
    "proj_out",
    "norm_out.linear",
)

RULES = (
    Rule(
        DIFFUSERS,
        "nothing",
        "names without a prefix are passed over",
        prefixes=("",),
        names=("diffusers", "bfl", "diffsynth", "sd3"),
    ),
    Rule(
        DIFFUSERS,
        "nothing",
        "names of ComfyUI are passed over",
        prefixes=("diffusion_model.", "model.diffusion_model."),
        names=("diffusers", "bfl", "sd3"),
    ),
    Rule(
        DIFFUSERS,
        "nothing",
        "names of kohya are passed over for SD3",
        families=("sd3",),
        prefixes=("lora_unet_",),
        names=("sd3",),
    ),
    Rule(DIFFUSERS, "nothing", "factors of LyCORIS are passed over", kinds=("loha", "lokr")),
    Rule(
        DIFFUSERS,
        "error",
        "names of PEFT are taken for those of a Kontext file: KeyError",
        prefixes=("base_model.model.",),
    ),
    Rule(
        DIFFUSERS,
        "error",
        "names of diffusers with underscores are not known: ValueError",
        prefixes=("lora_unet_",),
        names=("diffusers",),
    ),
    Rule(
        DIFFUSERS,
        "error",
        "factors named lora_linear_layer are not known: IndexError",
        factors=("lora_linear_layer",),
    ),
    Rule(
        DIFFUSERS,
        "part",
        "layers outside of the blocks are dropped, and the α of the last layer is ignored",
        families=("flux",),
        prefixes=("lora_unet_",),
        names=("bfl",),
        modules=_OUTER,
    ),
    Rule(
        DIFFUSERS,
        "part",
        "magnitudes of DoRA are dropped with a warning",
        factors=("dora_scale",),
    ),
)
"""What was measured: each dialect was loaded into a pipeline, and its output compared."""


def affected(report: MappingReport) -> dict[Rule, int]:
    """Return the rules that a file falls under, and how many of its tensors each one is about."""
    found: dict[Rule, int] = {}
    for fate in report.fates:
        if fate.dialect is None or fate.component != "transformer":
            continue
        for rule in RULES:
            if rule.holds(report.family, fate, fate.dialect):
                found[rule] = found.get(rule, 0) + 1
    return found
