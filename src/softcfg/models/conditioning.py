"""What the images of a model are conditioned on: the part of a family that reads what users give.

Class-conditional families share `LabelConditioning`. A text-to-image family derives its own from `PromptConditioning`
and names it in its generator's `conditioning_type`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from softcfg.errors import CheckpointError, UserError, quote, require_whole, suggestion
from softcfg.files import file_states
from softcfg.models.class_names import ClassNames
from softcfg.models.geometry import Geometry
from softcfg.models.ids import as_ids
from softcfg.prompts import PROMPT_OPTIONS, Prompt, as_prompts, is_text, with_negative

if TYPE_CHECKING:
    import torch
    from torch import nn

    from softcfg.models.base import Generator
    from softcfg.tokenizers.base import Tokenizer

# Fills a text encoder that lies on the meta device, and returns it. It takes the encoder, its weights file, the dtype
# and its parts, which are read, converted, rounded and moved one after the other; no more than one is there twice.
TextEncoderLoader = Callable[["nn.Module", Path, "torch.dtype", Iterable["nn.Module"]], "nn.Module"]


class Conditioning(ABC):
    """Turns what a user asks for into what a generator is conditioned on.

    It takes two steps. `requests` checks what was given and completes it with defaults: one class id or `Prompt` per
    image. `inputs` turns those into what `Generator.condition` takes: one object per image, of the family's own kind.

    Args:
        generator, tokenizer: the model.
        name: the model's name, for messages.
        classes: names of the classes, where the model has them.
        files: where the files lie that the family reads texts with, by their role in the model's entry.
        settings: how texts are read, from the model's entry, such as its template.
        quantize: the kind of integers that the weights of a text encoder are rounded to, as those of the generator.
        load: reads the weights of a text encoder, and puts it where it runs; see `TextEncoderLoader`.

    Attributes:
        takes_prompts: whether images are drawn from texts rather than from class ids.
        read_settings: the names of `settings` that the family reads; None for any.
        settings: `settings`, completed with the family's defaults; a run keeps them.
        keep_files: whether what was made of prompts may be kept in files, for other runs. The web page, which takes
            prompts of strangers, says no.

    Raises:
        UserError: the image tokenizer does not decode what the generator draws, or a setting is not known.
    """

    takes_prompts: ClassVar[bool]
    read_settings: ClassVar[Sequence[str] | None] = None

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        name: str = "this model",
        classes: Sequence[str] = (),
        files: Mapping[str, Path] | None = None,
        settings: Mapping[str, Any] | None = None,
        quantize: str | None = None,
        load: TextEncoderLoader | None = None,
    ) -> None:
        self.generator = generator
        self.tokenizer = tokenizer
        self.name = name
        self.classes = tuple(classes)
        self.files = dict(files or {})
        self._states = file_states(self.files.values(), CheckpointError)
        self.settings = dict(settings or {})
        known = self.settings if self.read_settings is None else self.read_settings
        for unknown in self.settings.keys() - set(known):
            raise UserError(
                f"{name}: its prompts are read without a setting {quote(unknown)} under text; "
                f"{suggestion(unknown, known) or 'known: ' + (', '.join(known) or 'none')}"
            )
        self.quantize = quantize
        self.load = load
        self.keep_files = True
        self.check_tokenizer()

    def require_unchanged(self) -> None:
        """Raise `UserError` if a file that texts are read with was written or replaced since it was loaded."""
        for path, before in zip(self.files.values(), self._states, strict=True):
            if file_states([path], CheckpointError) != (before,):
                raise UserError(f"{path} changed since it was loaded; load the model again")

    @classmethod
    def published_config(cls, files: Mapping[str, Path]) -> dict[str, Any]:
        """Fields of the generator's configuration that the family's text files say, such as ids of special tokens.

        Raises:
            CheckpointError: a file is damaged.
        """
        return {}

    def check_tokenizer(self) -> None:
        """Raise `UserError` unless the image tokenizer decodes what the generator draws."""
        drawn = (self.generator.num_tokens, self.generator.vocab_size)
        read = (self.tokenizer.num_tokens, self.tokenizer.codebook_size)
        if drawn != read:
            raise UserError(
                f"the generator draws {drawn[0]} tokens of {drawn[1]} codes, but the tokenizer reads {read[0]} tokens "
                f"of {read[1]} codes"
            )

    @abstractmethod
    def requests(
        self,
        labels: Any = None,
        prompts: Any = None,
        width: int | None = None,
        height: int | None = None,
        *,
        negative_prompt: Any = None,
    ) -> list[Any]:
        """What to draw, one request per image: class ids, or `Prompt`s with a size.

        Args:
            labels: class ids or names of classes; prompts may be given here too.
            prompts: texts or `Prompt`s.
            width, height: of the images of prompts that do not say, in pixels; the model's by default.
            negative_prompt: what the unconditional branch reads, of models where it reads a text: a text, or one per
                prompt, for prompts that do not say.

        Raises:
            UserError: something that the model does not draw.
        """

    @abstractmethod
    def inputs(self, requests: Sequence[Any]) -> list[Any]:
        """What `Generator.condition` takes for `requests`, one per image.

        Raises:
            UserError: a request that cannot be read, or files that are missing.
        """

    def check_inputs(self, requests: Sequence[Any]) -> None:
        """Raise `UserError` for requests that cannot be read or drawn; families that read slowly only look at them."""
        self.generator.condition(self.inputs(requests), guided=False)

    @abstractmethod
    def title(self, request: Any) -> str:
        """A short name of a request, to stand above its images."""

    @abstractmethod
    def image_size(self, width: int | None = None, height: int | None = None) -> tuple[int, int]:
        """Width and height, in pixels, of the images; the model's own where they are not given.

        Raises:
            UserError: the model does not draw images of this size.
        """

    @abstractmethod
    def geometry(self, width: int | None = None, height: int | None = None) -> Geometry:
        """How an image of this size, by default the model's, is laid out in tokens.

        Raises:
            UserError: the model does not draw images of this size.
        """


class LabelConditioning(Conditioning):
    """Images of classes: requests and inputs are class ids.

    Attributes:
        names: which class a name means.
    """

    takes_prompts = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = ClassNames(self.classes, self.generator.num_classes, self.name)

    def requests(
        self,
        labels: Any = None,
        prompts: Any = None,
        width: int | None = None,
        height: int | None = None,
        *,
        negative_prompt: Any = None,
    ) -> list[int]:
        """See `Conditioning.requests`. A text in `labels` is the name of a class, a number its id."""
        if prompts is not None or isinstance(labels, Prompt):
            raise UserError(f"{self.name} draws classes: give labels, it does not read prompts")
        if negative_prompt is not None:
            raise UserError(f"{self.name} draws classes: it takes no negative prompt")
        self.image_size(width, height)
        labels = [labels] if isinstance(labels, str) else labels
        if isinstance(labels, Sequence):
            texts = [label.text if isinstance(label, Prompt) else label for label in labels]
            labels = [self.names.id_of(text) if isinstance(text, str) else text for text in texts]
        classes = as_ids(labels, "labels", self.generator.num_classes)
        if classes.dim() != 1 or not len(classes):
            raise UserError(f"labels must be a flat list of at least one class id, got shape {list(classes.shape)}")
        return classes.tolist()

    def inputs(self, requests: Sequence[int]) -> list[int]:
        """The class ids themselves."""
        return list(requests)

    def title(self, request: int) -> str:
        """The name of the class, where it has one."""
        return self.names.title(request)

    def image_size(self, width: int | None = None, height: int | None = None) -> tuple[int, int]:
        """See `Conditioning.image_size`; there is one size."""
        if width is not None or height is not None:
            raise UserError(f"{self.name} draws images of one size, without width and height")
        return self.tokenizer.image_size, self.tokenizer.image_size

    def geometry(self, width: int | None = None, height: int | None = None) -> Geometry:
        """See `Conditioning.geometry`; there is one."""
        return Geometry.square(self.generator.num_tokens)


class PromptConditioning(Conditioning):
    """Images from texts: requests are `Prompt`s, and a family says what its generator reads in their place.

    A family defines `inputs` and, unless its images are square grids of codes of one size, `geometry`.

    Attributes:
        options: which of the `softcfg.prompts.PROMPT_OPTIONS` the model reads.
        any_size: whether there are images of other sizes than the default.
    """

    takes_prompts = True
    options: Sequence[str] = ()
    any_size: ClassVar[bool] = False

    def requests(
        self,
        labels: Any = None,
        prompts: Any = None,
        width: int | None = None,
        height: int | None = None,
        *,
        negative_prompt: Any = None,
    ) -> list[Prompt]:
        """See `Conditioning.requests`."""
        if prompts is None and is_text(labels):
            labels, prompts = None, labels
        if labels is not None:
            raise UserError(f"{self.name} draws from prompts: give texts, it has no classes")
        completed = with_negative(as_prompts(prompts, *self.image_size(width, height)), negative_prompt)
        for prompt in completed:
            self.check(prompt)
        return completed

    def check(self, prompt: Prompt) -> None:
        """Raise `UserError` for a prompt with something that the model does not read."""
        for option in PROMPT_OPTIONS:
            if getattr(prompt, option) is not None and option not in self.options:
                word = "negative prompt" if option == "negative_text" else f"{option} with a prompt"
                raise UserError(f"{self.name} takes no {word}: leave it out")

    def title(self, request: Prompt) -> str:
        """The text, shortened."""
        return request.title

    def image_size(self, width: int | None = None, height: int | None = None) -> tuple[int, int]:
        """See `Conditioning.image_size`."""
        default_width, default_height = self.default_size
        size = default_width if width is None else width, default_height if height is None else height
        require_whole(size[0], "width", 1)
        require_whole(size[1], "height", 1)
        self.geometry(*size)
        return size

    def size_of_ratio(self, ratio: str) -> tuple[int, int]:
        """Width and height, in pixels, of images whose sides are as WIDTH:HEIGHT, for families that choose the area.

        Raises:
            UserError: the family does not, or draws no such images.
        """
        raise UserError(f"{self.name} takes a width and a height, not the ratio {quote(ratio)}")

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height, in pixels, of images whose prompt does not say."""
        return self.tokenizer.image_size, self.tokenizer.image_size

    def geometry(self, width: int | None = None, height: int | None = None) -> Geometry:
        """See `Conditioning.geometry`; by default there is one size, of codes alone in a square grid."""
        size = self.default_size
        if (width or size[0], height or size[1]) != size:
            raise UserError(f"{self.name} draws images of {size[0]} x {size[1]} pixels only")
        return Geometry.square(self.generator.num_tokens)
