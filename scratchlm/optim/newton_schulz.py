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
    return device.type == "cuda"


def _normalised(matrices: list[Tensor], wide: int, dtype: torch.dtype) -> Tensor:
    """A batch of matrices of one shape, each divided by its Frobenius norm. In batches the first `wide` lie in memory as the batch does, the others are turned.

    On a GPU a few launches, through a copy; on a CPU, where a launch costs nothing, one matrix after the other.
    """
    of_norms = torch.float64 if dtype == torch.float64 else torch.float32
    one_by_one = not in_batches(matrices[0].device)
    if one_by_one:
        norms = [torch.linalg.vector_norm(matrix, dtype=of_norms) for matrix in matrices]
    else:
        whole = [*matrices[:wide], *(matrix.mT for matrix in matrices[wide:])]
        norms = list(torch._foreach_norm(whole, 2, dtype=of_norms))
    scales = 1 / (torch.stack(norms) + EPS)
    batch = matrices[0].new_empty(len(matrices), *matrices[0].shape, dtype=dtype)
    if one_by_one:
        for slot, scale, matrix in zip(batch.unbind(), scales.unbind(), matrices, strict=True):
            torch.mul(matrix, scale, out=slot)
        return batch
    scales = scales.view(-1, 1, 1)
    if wide:
        torch.mul(torch.stack(whole[:wide]), scales[:wide], out=batch[:wide])
    if wide < len(whole):
        torch.mul(torch.stack(whole[wide:]).mT, scales[wide:], out=batch[wide:])
    return batch


def alike(matrices: list[Tensor]) -> list[list[int]]:
    """Which of them are of one shape, up to transposition: for :func:`orthogonalise_alike`. What has no rows or columns is left out."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        if matrix.numel():
            by_shape.setdefault((min(matrix.shape), max(matrix.shape)), []).append(index)
    groups = list(by_shape.values())
    if groups and in_batches(matrices[0].device):  # those that lie as the batch does come first
        groups = [
            sorted(group, key=lambda index: matrices[index].shape[0] > matrices[index].shape[1]) for group in groups
        ]
    return groups


@torch.no_grad()
def orthogonalise_alike(
    matrices: list[Tensor], dtype: torch.dtype | None = None, steps: int = STEPS
) -> list[Tensor]:
    """As :func:`orthogonalise`, for one group of :func:`alike`."""
    wide = [matrix.shape[0] <= matrix.shape[1] for matrix in matrices]
    lying = [matrix if lies else matrix.mT for matrix, lies in zip(matrices, wide, strict=True)]
    chosen = dtype if dtype is not None else fast_dtype(matrices[0].device.type)
    found = newton_schulz_fast(_normalised(lying, sum(wide), chosen), steps)
    return [slot if lies else slot.mT for slot, lies in zip(found.unbind(), wide, strict=True)]


def orthogonalise(matrices: list[Tensor], dtype: torch.dtype | None = None, steps: int = STEPS) -> list[Tensor]:
    """Orthogonalise many matrices at once: those of equal shape (up to transposition) share one batched iteration.

    On a GPU all is done for a batch at a time, since a small model's matrices take less time than launching something for each.

    Args:
        matrices: each (rows, columns), floating, all on one device.
        dtype: dtype of the iteration; None: :func:`fast_dtype`.
        steps: how often the quintic is applied.

    Returns:
        One tensor for each, in its shape and order and in the dtype of the iteration (views of the batches).
    """
    results = list(matrices)
    for group in alike(matrices):
        found = orthogonalise_alike([matrices[index] for index in group], dtype, steps)
        for index, result in zip(group, found, strict=True):
            results[index] = result
    return results
