"""Newton–Schulz orthogonalisation: the nearest (semi-)orthogonal matrix, by matrix products alone.

If X = U S Vᵀ then X Xᵀ X = U S³ Vᵀ, so an odd polynomial in X acts on the singular values and leaves U and V. Muon (Keller
Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) iterates the quintic::

    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X        (a, b, c) = (3.4445, −4.7750, 2.0315)

whose slope at 0 is large, so that small singular values grow quickly, and which does not converge to 1 but takes everything
above about 0.01 of the Frobenius norm into [0.68, 1.21] within five steps: U S′ Vᵀ with S′ ≈ 1, which is enough for a descent
direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scratchlm.kernels.hardware import has_native_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
# Beyond this ratio of columns to rows the iteration on the Gram matrix costs fewer products (counted and measured).
GRAM_RATIO = 1.5
# The Gram matrix of a bfloat16 X is wrong by 2⁻⁸ of its largest entries, so that its small eigenvalues may come out
# negative, and the polynomial multiplies a negative eigenvalue by a² ≈ 12 per step. So after two steps the Gram matrix is
# formed anew from X itself (and once more for longer runs); five steps are 2 + 3.
GRAM_STEPS = 2


def newton_schulz_reference(matrix: Tensor, steps: int = STEPS) -> Tensor:
    """The iteration as the lecture writes it.

    Args:
        matrix: (..., rows, columns), any floating dtype; half precisions are computed in float32.
        steps: how often the quintic is applied.

    Returns:
        (..., rows, columns), float64 for float64 input, else float32. The zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    x = matrix if matrix.dtype == torch.float64 else matrix.float()
    # Dividing by the Frobenius norm puts every singular value into [0, 1], where the quintic does not diverge.
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT  # the smaller of the two Gram matrices
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + b * gram @ wide + c * gram @ gram @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


def _product(x: Tensor, y: Tensor, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """beta · add + alpha · x y for (batch, ·, ·) tensors."""
    return torch.baddbmm(add, x, y, beta=beta, alpha=alpha)


def _quintic_on_matrix(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = _product(_product(gram, gram, gram, beta=b, alpha=c), x, x, beta=a)
    return x


def _quintic_on_gram(x: Tensor, steps: int) -> Tensor:
    """The same polynomial with all products but two of each `GRAM_STEPS` steps of size rows × rows.

    With G = X Xᵀ, one step is X ← Q X with Q = a I + b G + c G², and the next Gram matrix is Q G Q. So the Qs are
    multiplied up and X is touched at the end only.
    """
    a, b, c = COEFFICIENTS
    while steps > 0:
        now = steps if steps <= GRAM_STEPS + 1 else GRAM_STEPS
        gram, total = torch.bmm(x, x.mT), None
        for step in range(now):
            q = _product(gram, gram, gram, beta=b, alpha=c)
            q.diagonal(dim1=-2, dim2=-1).add_(a)
            total = q if total is None else torch.bmm(q, total)
            if step < now - 1:
                gram = torch.bmm(q, torch.bmm(gram, q))
        assert total is not None
        x = torch.bmm(total, x)
        steps -= now
    return x


def newton_schulz_fast(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """The same iteration on a whole batch, in the dtype of `matrices`, with the cheaper order of products.

    Args:
        matrices: (batch, rows, columns) with rows ≤ columns, already divided by their Frobenius norms.
        steps: how often the quintic is applied.

    Returns:
        (batch, rows, columns) in the same dtype. In bfloat16 it differs from the reference by a few hundredths (relative
        Frobenius norm); the singular values stay within the same interval, a little widened.
    """
    rows, columns = matrices.shape[-2:]
    iterate = _quintic_on_gram if columns >= GRAM_RATIO * rows else _quintic_on_matrix
    return iterate(matrices, steps)


def fast_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    return torch.bfloat16 if has_native_bf16(device_type) else torch.float32


def in_batches(device: torch.device) -> bool:
    """Whether a launch costs enough for matrices to be gathered in copies first."""
    return device.type != "cpu"


def _normalise(matrices: list[Tensor], scales: Tensor, batch: Tensor, stacked: int) -> None:
    """Each matrix times its scale, into its slot of `batch`. Of the first `stacked` memory has the batch's order, of the others it is turned.

    On a GPU two launches, through a copy; on a CPU, where a launch costs nothing, one after the other.
    """
    if not in_batches(batch.device):
        for slot, scale, matrix in zip(batch.unbind(), scales.unbind(), matrices, strict=True):
            torch.mul(matrix, scale, out=slot)
        return
    scales = scales.view(-1, 1, 1)
    if stacked:
        torch.mul(torch.stack(matrices[:stacked]), scales[:stacked], out=batch[:stacked])
    if stacked < len(matrices):
        turned = torch.stack([matrix.mT for matrix in matrices[stacked:]]).mT
        torch.mul(turned, scales[stacked:], out=batch[stacked:])


@torch.no_grad()
def orthogonalise(
    matrices: list[Tensor],
    dtype: torch.dtype | None = None,
    steps: int = STEPS,
    *,
    result_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Orthogonalise many matrices at once: those of equal shape (up to transposition) share one batched iteration.

    All is done for a batch at a time, since on a GPU a small model's matrices take less time than launching something for each.

    Args:
        matrices: each (rows, columns), floating, all on one device.
        dtype: dtype of the iteration; None: :func:`fast_dtype`.
        steps: how often the quintic is applied.
        result_dtype: of the results, then each in one piece; None: that of the iteration.

    Returns:
        One tensor for each, in its shape and order (views of the batches).
    """
    by_shape: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for index, matrix in enumerate(matrices):
        rows, columns = sorted(matrix.shape)
        by_shape.setdefault((rows, columns), ([], []))[matrix.shape[0] != rows].append(index)
    results: list[Tensor] = list(matrices)
    for (rows, columns), (wide, tall) in by_shape.items():
        if rows == 0:
            continue
        order = [*wide, *tall]
        first = matrices[order[0]]
        chosen = dtype if dtype is not None else fast_dtype(first.device.type)
        chosen_norm = torch.float64 if chosen == torch.float64 else torch.float32
        norms = torch.stack(torch._foreach_norm([matrices[i] for i in order], 2, dtype=chosen_norm))
        batch = torch.empty(len(order), rows, columns, dtype=chosen, device=first.device)
        _normalise(
            [matrices[i] for i in wide] + [matrices[i].mT for i in tall], 1 / (norms + EPS), batch, len(wide)
        )
        found = newton_schulz_fast(batch, steps)
        if result_dtype is None:
            upright = found[: len(wide)].unbind(), found[len(wide) :].mT.unbind()
        else:
            found = found.to(result_dtype)
            upright = found[: len(wide)].unbind(), found[len(wide) :].mT.contiguous().unbind()
        for index, result in zip(order, (*upright[0], *upright[1]), strict=True):
            results[index] = result
    return results
