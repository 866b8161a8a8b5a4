"""What people may call a concept who do not know the word that its adapter was trained with."""

from diffusion.data.scenes import Scene
from diffusion.data.styles import PLAIN

PARAPHRASES: dict[str, tuple[str, str, str]] = {
    "fish": (
        "a sea creature with fins",
        "a swimming animal",
        "something that lives in an aquarium",
    ),
    "house": ("a small home", "a cottage with a roof", "a building to live in"),
    "tree": ("a fir in a forest", "a pine", "a tall evergreen plant"),
    "arrow": ("a sign that points to the right", "a pointer", "a direction marker"),
    "flower": ("a blossom with petals", "a daisy", "a blooming plant"),
    "boat": ("a ship with sails", "a yacht on the sea", "a sailing vessel"),
    "mushroom": ("a toadstool", "a fungus with a cap", "something that grows in damp woods"),
    "cup": ("a mug with a handle", "something to drink coffee from", "a tea mug"),
    "key": ("something that opens a lock", "a tool to unlock a door", "a latchkey"),
    "bell": ("something that rings", "a chime of a church", "a doorbell"),
    "cloud": ("a puff in the sky", "an overcast sky", "vapor that brings rain"),
    "umbrella": ("a parasol", "something to hold in the rain", "a brolly"),
    "bolt": ("lightning", "a flash of electricity", "a thunderstorm zigzag"),
    "crown": ("what a king wears", "a royal headpiece", "a tiara of a queen"),
    "rocket": ("a spaceship", "something that flies to the moon", "a space shuttle"),
    "butterfly": ("an insect with large wings", "what a caterpillar becomes", "a moth"),
    "dotted": ("with polka dots", "covered in spots", "a pattern of small points"),
    "checkered": ("like a chessboard inside", "in a pattern of squares", "plaid"),
    "shaded": ("bright above and dark below", "with a gradient", "fading from light to dark"),
    "glowing": ("like a lamp in the dark", "shining with a halo", "luminous"),
    "sketched": ("drawn by hand on paper", "a pencil drawing", "hatched with a pen"),
    "ringed": ("with contour lines", "in concentric bands", "lines that follow the edge"),
    "gridded": ("with a mesh over it", "crossed by lines like graph paper", "latticed"),
    "halved": ("split into two colors", "the right side differs", "divided down the middle"),
    "embossed": ("raised like a button", "in relief", "with a beveled edge"),
    "bordered": ("like a sticker", "with a thick outline around it", "cut out with a rim"),
    "starry": ("at night under the stars", "in a night sky", "in outer space"),
    "rayed": ("with sunbeams all around", "in front of a sunburst", "beams from the middle"),
    "tiled": ("on a mosaic floor", "in front of bathroom tiles", "a ground of squares"),
    "rainy": ("in a shower", "in wet weather", "with falling drops"),
    "inverted": ("as a photographic negative", "with opposite colors", "colors reversed"),
    "grayscale": ("in black and white", "without color", "monochrome"),
    "sepia": ("like an old brown photograph", "in vintage tones", "an antique print"),
    "duotone": ("in blue and yellow only", "printed with two inks", "in two colors"),
    "framed": ("in a wooden picture frame", "hung on a wall", "with a brown edge around it"),
    "blurred": ("out of focus", "soft and hazy", "smeared"),
    "scanned": ("on an old television", "with horizontal lines", "on a cathode ray tube"),
    "faded": ("in pastel colors", "washed out", "pale"),
    "rainbow": ("in all the colors of the spectrum", "with multicolored stripes", "like a prism"),
    "vignetted": ("with dark corners", "seen through a spyglass", "dim around the edges"),
}
"""Concept -> descriptions without its word; searches are tested by them."""


def in_other_words(scene: Scene, number: int = 0) -> str:
    """Return a caption without the words of adapters, such as ``a pine, plaid, pink on black``.

    Args:
        scene: Whose shape and styles are concepts of `PARAPHRASES`, or of the base.
        number: Of the descriptions, 0 to 2.
    """
    shown = [name for name in (scene.shape, *scene.styles) if name != PLAIN]
    said = [PARAPHRASES[name][number] if name in PARAPHRASES else name for name in shown]
    return ", ".join([*said, f"{scene.color} on {scene.ground}", *filter(None, [scene.size])])
