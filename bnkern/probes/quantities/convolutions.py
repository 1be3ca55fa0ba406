"""The summands of a convolution's weight gradient: equation 4, Table 1 and Figure 7 of the paper."""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import bnkern
from bnkern.conv import Handoff, gradient_sums

from .base import Arrays, Quantity, RecorderProtocol, ratio

Sizes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # of kernel, stride and padding


class WeightGradientSigns(Quantity):
    """``weight_gradient_signs``: whether the summands d of a convolution's weight gradient agree in sign.

    The gradient of a weight is a sum of d = dy * x over images and output pixels (:func:`bnkern.conv2d_grad_signs`).
    For each weight: ``sum`` (the gradient), ``abs_sum`` = sum |d|, ``sign_sum`` = sum sign d, and the number
    ``nonzero``; and ``ratio`` = abs_sum / |sum|, ``agreement`` = |sign_sum| / nonzero. Unit: that of the loss.

    Args:
        layers: Patterns of module names.
        form: "full" has the sums above, [O, I, kh, kw] each. "summary" has, over the weights of a layer, the means
            ``abs_sum`` (the paper's a, times N) and ``abs_of_sum`` (b, times N), ``ratio`` = a / b, ``ratio_sqrt`` =
            a / (b sqrt N), which is near 1 for independent signs, ``agreement`` = mean |sign_sum| / mean nonzero, and
            N = B H' W' as ``places``. "channels" is the paper's Figure 7, with M[o, i] = sum over kh, kw of |sum d| as
            ``abs_of_sum`` and of sum |d| as ``abs_sum``.
        sums: Those of sum, abs_sum, sign_sum and nonzero to record in the full form. Fewer are faster.
        centred: "input" or "gradient" subtracts from x or dy its mean over images and pixels of each channel, before
            any padding. This removes the contribution of the channel's mean. ``sum`` is then not the gradient.

    Recorded together with the weight gradient (``conv_grad_signs``) from tiles that are loaded once. Ranks are added in
    the full form. The other forms are not sums, and keep an axis of ranks. Source: the paper, equation 4, Table 1,
    Figure 7, appendix J.
    """

    name = "weight_gradient_signs"
    rows: tuple[str, ...] = ("sum", "abs_sum", "sign_sum", "nonzero")
    FORMS: ClassVar = {
        "full": rows,
        "summary": ("places", "abs_sum", "abs_of_sum", "abs_of_sign_sum", "nonzero"),
        "channels": ("abs_of_sum", "abs_sum"),
    }
    NEEDS: ClassVar = {"full": rows, "summary": rows, "channels": ("sum", "abs_sum")}

    def __init__(
        self,
        layers: str | Iterable[str] | None = None,
        form: str = "full",
        sums: Iterable[str] | None = None,
        centred: str | None = None,
    ) -> None:
        super().__init__(layers)
        if form not in self.FORMS:
            raise ValueError(f"weight_gradient_signs: form must be one of {', '.join(self.FORMS)}; got {form!r}")
        unknown = set(sums or ()) - set(WeightGradientSigns.rows)
        if unknown or (sums is not None and form != "full"):
            raise ValueError(
                f"weight_gradient_signs: sums must be among {', '.join(WeightGradientSigns.rows)}, and need the "
                f"full form; got {list(sums or ())} with form {form!r}"
            )
        if centred not in (None, "input", "gradient"):
            raise ValueError(f"weight_gradient_signs: centred must be input, gradient or None; got {centred!r}")
        self.form, self.centred = form, centred
        self.sums = tuple(row for row in self.NEEDS[form] if sums is None or row in sums)
        self.rows = self.sums if form == "full" else self.FORMS[form]

    def options(self) -> dict[str, object]:
        own = {"form": self.form, "sums": list(self.sums) if self.form == "full" else None, "centred": self.centred}
        return super().options() | own

    def concerns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d)

    def refuses(self, module: nn.Module) -> str | None:
        if module.groups != 1:
            return f"the convolution has {module.groups} groups; only 1 is supported"
        if module.dilation != (1, 1):
            return f"the convolution has dilation {module.dilation}; only 1 is supported"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return "the convolution's padding is not a number of zeros"
        if not module.weight.requires_grad:
            return "its weight needs no gradient"
        return None

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Conv2d) -> list:  # type: ignore[override]  # what concerns() takes
        def measure(x: Tensor, dy: Tensor, out: Tensor, handoff: Handoff | None = None) -> None:
            if self.centred == "input":
                x = x - x.mean((0, 2, 3), keepdim=True)
            elif self.centred == "gradient":
                dy = dy - dy.mean((0, 2, 3), keepdim=True)
            handoff = None if self.centred else handoff
            # Pairs of numbers. torch's annotations allow more, but refuses() excludes that.
            sizes: Sizes = (module.kernel_size, module.stride, module.padding)  # type: ignore[assignment]
            if handoff:  # of a bnkern.nn.Conv2d, whose backward takes over the gradient
                signs = gradient_sums(x, dy, *sizes, {*self.sums, "sum"})
                handoff.put(dy, signs.sum)  # type: ignore[arg-type]  # not None, because it is wanted
            else:
                signs = bnkern.conv2d_grad_signs(x, dy, *sizes, wanted=self.sums)
            self._fill(out, signs, places=dy.numel() // dy.shape[1])

        shape = self._shape(module.weight)
        return [recorder.on_gradient(layer, module, self, shape, measure)]

    def _shape(self, weight: Tensor) -> tuple[int, ...]:
        return {"full": tuple(weight.shape), "summary": (), "channels": tuple(weight.shape[:2])}[self.form]

    def _fill(self, out: Tensor, signs: "bnkern.GradSigns", places: int) -> None:
        if self.form == "full":
            for k, row in enumerate(self.sums):
                out[k].copy_(getattr(signs, row))
            return
        assert signs.sum is not None and signs.abs_sum is not None, "NEEDS asks for them"
        if self.form == "channels":
            out[0].copy_(signs.sum.double().abs().sum((2, 3)))
            out[1].copy_(signs.abs_sum.double().sum((2, 3)))
        else:
            assert signs.sign_sum is not None and signs.nonzero is not None, "NEEDS asks for them"
            means = (signs.abs_sum, signs.sum.abs(), signs.sign_sum.abs(), signs.nonzero)
            out[0].fill_(places)
            torch.stack([t.double().mean() for t in means], out=out[1:])

    @staticmethod
    def oracle(x: Tensor, dy: Tensor, module: nn.Conv2d) -> dict[str, Tensor]:
        """Returns the derived arrays of the full form from all summands. The memory is N times that of the weight."""
        assert not isinstance(module.padding, str)
        columns = nn.functional.unfold(
            x.detach().double(), module.kernel_size, 1, module.padding, module.stride
        )  # [B, I kh kw, H' W']
        d = torch.einsum("bop,bip->oibp", dy.detach().double().flatten(2), columns).flatten(2)
        shape = module.weight.shape
        total, absolute, sign = (t.sum(2).view(shape) for t in (d, d.abs(), d.sign()))
        nonzero = (d != 0).sum(2).double().view(shape)
        return {
            "sum": total, "abs_sum": absolute, "sign_sum": sign, "nonzero": nonzero,
            "ratio": absolute / total.abs(), "agreement": sign.abs() / nonzero,
        }  # fmt: skip

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        return ranks.sum(0) if self.form == "full" else np.moveaxis(ranks, 0, -1)

    def derive(self, values: np.ndarray) -> Arrays:
        raw = super().derive(values)
        if self.form == "channels":
            return raw
        if self.form == "summary":
            quotient = ratio(raw["abs_sum"], raw["abs_of_sum"])
            agreement = ratio(raw.pop("abs_of_sign_sum"), raw.pop("nonzero"))
            return raw | {"ratio": quotient, "ratio_sqrt": quotient / np.sqrt(raw["places"]), "agreement": agreement}
        if "sum" in raw and "abs_sum" in raw:
            raw["ratio"] = ratio(raw["abs_sum"], np.abs(raw["sum"]))
        if "sign_sum" in raw and "nonzero" in raw:
            raw["agreement"] = ratio(np.abs(raw["sign_sum"]), raw["nonzero"])
        return raw
