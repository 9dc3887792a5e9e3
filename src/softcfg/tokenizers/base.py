"""What every image tokenizer is: a convolutional or transformer autoencoder around a codebook."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.errors import UserError
from softcfg.images import resize
from softcfg.nn.memory import replace_contents
from softcfg.nn.precision import KeepsTables, dtype_name, own_dtype

# Elements of the distance matrix that a nearest-code search holds at a time (64 MiB of float32).
DISTANCES_AT_ONCE = 2**24
# Pixels of the images that a CPU decodes or encodes at once: two of 256 x 256, 14 of 96 x 96. More are no faster, and
# the activations of one of 256 x 256 can take 350 MB.
PIXELS_AT_ONCE = 2**17
# How far outside of [0, 1] a pixel may lie and still count as rounding.
PIXEL_TOLERANCE = 1e-3


class Codebook(nn.Module):
    """The table of codes: `embedding.weight` [codes, channels].

    With `l2_norm`, codes and latents are compared, and codes read, at unit length, however rows are stored.
    """

    def __init__(self, codes: int, channels: int, *, l2_norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        self.l2_norm = l2_norm

    def rows(self) -> Tensor:
        """Return the table as it is read, [codes, channels]."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the rows of `tokens` int64 [...] as [..., channels]; differentiable in the table."""
        rows = self.embedding(tokens)
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Return the code of least squared L2 distance to each of `latents` [..., channels], as int64 [...].

        Distances are computed in float32 or better, in pieces of bounded memory.
        """
        dtype = torch.promote_types(latents.dtype, torch.float32)
        rows = self.rows().to(dtype)
        flat = latents.reshape(-1, latents.shape[-1]).to(dtype)
        if self.l2_norm:
            flat = F.normalize(flat, dim=-1)
        # |z - e|² less |z|², which is the same for every code.
        square = rows.square().sum(-1)
        pieces = flat.split(max(1, DISTANCES_AT_ONCE // len(rows)))
        codes = [torch.addmm(square, piece, rows.T, alpha=-2).argmin(-1) for piece in pieces]
        return torch.cat(codes).view(latents.shape[:-1])


class Tokenizer(KeepsTables):
    """Base of the image tokenizers: int64 tokens [B, T] to pixels [B, 3, H, W] in [0, 1] and back.

    A subclass sets the attributes below, gives `encode_latents` and `decode_latents`, and holds its codes in
    `quantize`. Token t of an image stands at row t // w, column t % w of its latents [B, channels, h, w].

    A tokenizer of `any_size` takes images of other sizes too: the attributes that say the size are the defaults,
    tokens come with their grid (h, w), and pixels have a height and width that are multiples of `patch_size`.

    With an `output_size`, decoded images, which must be squares, are resized to it before they are clamped and rounded:
    published figures of models of 384 pixels are of images of 256 (see `softcfg.images.resize`).
    """

    num_tokens: int  # tokens per image, T = h * w
    codebook_size: int
    image_size: int  # H and W
    latent_size: tuple[int, int]  # (h, w)
    any_size: bool = False
    patch_size: int  # width of a token in pixels, where tokens form a grid
    num_channels: int = 3
    output_size: int | None = None  # H and W of decoded images, where they are resized
    rounds: bool = False  # whether 8-bit values are rounded, not truncated
    quantize: Codebook

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights, in which it computes."""
        return self.quantize.embedding.weight.dtype

    def set_size(self, image_size: int, patch_size: int) -> None:
        """Set the attributes of square images of one token per patch."""
        side = image_size // patch_size
        self.image_size, self.patch_size = image_size, patch_size
        self.latent_size, self.num_tokens = (side, side), side * side

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return the encoder's output before quantisation, [B, channels, h, w]; differentiable, unchecked."""
        raise NotImplementedError

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return the decoder's pixels [B, 3, H, W] before any clamp; differentiable, unchecked."""
        raise NotImplementedError

    def quantize_latents(self, latents: Tensor) -> Tensor:
        """Return the tokens int64 [B, T] whose codes lie nearest to `latents` [B, channels, h, w]."""
        return self.quantize.nearest(latents.flatten(2).transpose(1, 2))

    def embed_tokens(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the codes of `tokens` int64 [B, T] as latents [B, channels, h, w]; differentiable."""
        return self.quantize.lookup(tokens).transpose(1, 2).unflatten(2, grid or self.latent_size)

    @torch.no_grad()
    @own_dtype()
    def decode(self, tokens: Any, grid: tuple[int, int] | None = None) -> Tensor:
        """Turn tokens into images.

        Args:
            tokens: integers in [0, codebook_size), [B, T], [B, 1, T] or, of images of any size, [B, h, w]; a tensor,
                array or nested list.
            grid: (h, w) of images that are not of the default size; tokens [B, h, w] say it themselves.

        Returns:
            float32 [B, 3, H, W], clamped to [0, 1], on the device of the tokenizer.

        Raises:
            UserError: wrong shape, type, or a token outside the codebook; or the decoder's output is NaN or infinite.
        """
        pixels = self.decode_raw(tokens, grid).float()
        self._require_finite(pixels, "pixels of its decoder")
        return pixels.clamp(0, 1)

    @torch.no_grad()
    @own_dtype()
    def decode_raw(self, tokens: Any, grid: tuple[int, int] | None = None) -> Tensor:
        """Like `decode`, in the tokenizer's own dtype and before the clamp."""
        tokens = _as_tensor(tokens, "tokens")
        if grid is None and self.any_size and tokens.ndim == 3 and tokens.shape[1] > 1:
            grid = (tokens.shape[1], tokens.shape[2])
            tokens = tokens.flatten(1)
        grid = self.checked_grid(grid)
        self._channels_last()
        size = self.image_size**2 if grid == self.latent_size else grid[0] * grid[1] * self.patch_size**2

        def decode(some: Tensor) -> Tensor:
            return self.decode_latents(self.embed_tokens(some, grid)).contiguous()

        pixels = _in_pieces(decode, self._checked_tokens(tokens, grid), size)
        return pixels if self.output_size is None else resize(pixels, self.output_size)

    @torch.no_grad()
    @own_dtype()
    def encode(self, pixels: Any) -> Tensor:
        """Turn images into tokens.

        Args:
            pixels: floats in [0, 1], [B, 3, H, W]; a tensor, array or nested list.

        Returns:
            int64 [B, T] in raster order, on the device of the tokenizer.

        Raises:
            UserError: wrong shape or type, a value outside [0, 1] or not a number; or the encoder's output is NaN or
                infinite.
        """
        self._channels_last()
        pixels = self._checked_pixels(pixels)
        latents = _in_pieces(self.encode_latents, pixels, pixels.shape[2] * pixels.shape[3])
        self._require_finite(latents, "latents of its encoder")
        return self.quantize_latents(latents)

    def to_uint8(self, pixels: Tensor) -> Tensor:
        """Convert images from float [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3], as the released code does."""
        return to_uint8(pixels, rounded=self.rounds)

    def _channels_last(self) -> None:
        """Lay kernels of convolutions out channels last in bfloat16 on a CPU, where they are three times as fast so.

        In float32 the gain is a tenth, for other last bits.
        """
        if self.dtype == torch.bfloat16 and self.quantize.embedding.weight.is_cpu:
            for weight in self.parameters():
                if weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
                    replace_contents(weight, partial(weight.contiguous, memory_format=torch.channels_last))

    def _require_finite(self, values: Tensor, name: str) -> None:
        """Raise a `UserError` unless all `values` [B, ...] are numbers; a NaN would become a black pixel."""
        sums = values.flatten(1).sum(dim=1, dtype=torch.float32)  # one pass, and no memory
        if not sums.isfinite().all():
            bad = int((~sums.isfinite()).nonzero()[0])
            raise UserError(
                f"image {bad}: the {name} are not finite, computed in {dtype_name(self.dtype)}; "
                "the tokenizer's weights are damaged (get them again), or its numbers are too large for this dtype "
                "(load it in float32)"
            )

    @property
    def decoded_size(self) -> int:
        """H and W of decoded images of the default size."""
        return self.output_size or self.image_size

    def checked_grid(self, grid: tuple[int, int] | None) -> tuple[int, int]:
        """The grid (h, w) of images, by default that of the default size; raises `UserError` if it is not decoded."""
        height, width = grid or self.latent_size
        if self.output_size is not None and height != width:
            raise UserError(
                f"images are resized to squares of {self.output_size} pixels, but these have {height} x {width} "
                "tokens; draw squares, or leave out image_size_eval"
            )
        if grid is None or grid == self.latent_size:
            return self.latent_size
        if not self.any_size:
            raise UserError(f"this tokenizer's grid is {list(self.latent_size)}, got {list(grid)}")
        if len(grid) != 2 or min(grid) < 1:
            raise UserError(f"grid must be two numbers (h, w) greater than 0, got {grid!r}")
        return grid

    def check_tokens(self, tokens: Any, grid: tuple[int, int] | None = None) -> None:
        """Raise `UserError` unless `decode` takes these tokens."""
        self._checked_tokens(_as_tensor(tokens, "tokens"), self.checked_grid(grid))

    def _checked_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise UserError(f"tokens must be integers, got {dtype_name(tokens.dtype)}; convert them to int64")
        if tokens.ndim == 3 and tokens.shape[1] == 1:
            tokens = tokens.squeeze(1)
        count = grid[0] * grid[1]
        if tokens.ndim != 2 or tokens.shape[1] != count:
            raise UserError(f"tokens must have shape [B, {count}] or [B, 1, {count}], got {list(tokens.shape)}")
        tokens = tokens.long()
        if tokens.numel():
            least, most = (bound.item() for bound in tokens.aminmax())
            if least < 0 or most >= self.codebook_size:
                wrong = least if least < 0 else most
                raise UserError(f"tokens must be in the range 0 to {self.codebook_size - 1}, found {wrong}")
        return tokens.to(self.quantize.embedding.weight.device)

    def _checked_pixels(self, pixels: Any) -> Tensor:
        pixels = _as_tensor(pixels, "pixels")
        if not pixels.is_floating_point():
            raise UserError(f"pixels must be floats, got {dtype_name(pixels.dtype)}; divide 8-bit values by 255")
        if not self._fits(pixels.shape):
            wanted = f"[B, {self.num_channels}, {self.image_size}, {self.image_size}]"
            if self.any_size:
                wanted = f"[B, {self.num_channels}, H, W] with H and W multiples of {self.patch_size}"
            raise UserError(f"pixels must have shape {wanted}, got {list(pixels.shape)}")
        if pixels.numel():
            least, most = (bound.item() for bound in pixels.aminmax())  # both are NaN where any pixel is
            if not (least >= -PIXEL_TOLERANCE and most <= 1 + PIXEL_TOLERANCE):
                raise UserError(
                    "pixels must be numbers in the range 0 to 1 (8-bit values divided by 255), "
                    f"found {least:.4g} to {most:.4g}"
                )
        return pixels.to(self.quantize.embedding.weight)  # device and dtype

    def _fits(self, shape: torch.Size) -> bool:
        if len(shape) != 4 or shape[1] != self.num_channels:
            return False
        if self.any_size:
            return all(side > 0 and side % self.patch_size == 0 for side in shape[2:])
        return shape[2:] == (self.image_size, self.image_size)


def _in_pieces(run: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """What `run` makes of images [B, ...] of `size` pixels each; on a CPU of few at a time, for their activations.

    Each time of as many, so that the bits of an image do not depend on its place in the batch.
    """
    count = len(images)
    pieces = -(-count // max(1, PIXELS_AT_ONCE // size)) if images.is_cpu else 1
    if pieces <= 1:
        return run(images)
    each = -(-count // pieces)
    places = torch.arange(pieces * each).clamp(max=count - 1)  # the last image fills up the last piece
    return torch.cat([run(images[some]) for some in places.split(each)])[:count]


@torch.no_grad()
def to_uint8(pixels: Tensor, *, rounded: bool = False) -> Tensor:
    """Convert images from float [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3]: 255 x, truncated or `rounded`."""
    values = pixels.float().clamp(0, 1).mul_(255)
    if rounded:
        values.add_(0.5)
    # The move of the channels comes last, where a pixel is one byte.
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _as_tensor(values: Any, name: str) -> Tensor:
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} must be a tensor, an array or a nested list of numbers: {error}") from error
    if found.is_meta:
        raise UserError(f"{name} have no values, they are on the meta device")
    return found
