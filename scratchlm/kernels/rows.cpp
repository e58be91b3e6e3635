// What stands between the products of a training step on a CPU, and its gradients, each in one pass over memory. The formulas: model/norm.py, model/feedforward.py, model/rope.py.
//
//     RMSNorm    x ■■■■ ─ Σ x² ─ 1/rms ──► y ■■■■      a row is read twice, the second time from the first cache
//     SwiGLU     g ■■■■│u ■■■■ ──────────► y ■■■■
//     RoPE       q ■■│k ■■│v ■■ ─────────► q ■■  k ■■  v ■■    a token's heads, turned pair by pair on their way
//
// A thread takes rows, or tokens. Sums are fp32, in an order that the number of threads does not change.

#include "vectors.h"

namespace {

constexpr int64_t FEW = 1 << 14;  // numbers for which waking a second thread takes longer than the work

// --- RMSNorm --------------------------------------------------------------------------------------------------------------

// Rows that lie in three dimensions.
struct Rows {
    int64_t size[3];
    int64_t count() const { return size[0] * size[1] * size[2]; }
};

// One of them, and the next: a division takes as long as a row of 64 numbers.
struct Place {
    const Rows& rows;
    int64_t at[3];
    Place(const Rows& rows, int64_t row) : rows(rows) {
        at[2] = row % rows.size[2];
        at[1] = row / rows.size[2] % rows.size[1];
        at[0] = row / rows.size[2] / rows.size[1];
    }
    void next() {
        if (++at[2] < rows.size[2]) return;
        at[2] = 0;
        if (++at[1] < rows.size[1]) return;
        at[1] = 0;
        ++at[0];
    }
    template <class T> T* in(T* base, const int64_t* strides) const {
        return base + at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2];
    }
};

template <class Kind>
void norm(
    const Rows& rows, int64_t width, const typename Kind::number* x, const float* gain, typename Kind::number* y, float* inverses,
    const int64_t* strides, float eps, int threads) {
#pragma omp parallel num_threads(threads) if (rows.count() * width > FEW)
    {
        const int64_t thread = omp_get_thread_num(), all_threads = omp_get_num_threads();
        const int64_t begin = rows.count() * thread / all_threads, end = rows.count() * (thread + 1) / all_threads;
        Place place(rows, begin);
        for (int64_t row = begin; row < end; ++row, place.next()) {
            const auto* from = place.in(x, strides);
            auto* to = place.in(y, strides + 3);
            floats squares{};
            for (int64_t j = 0; j < width; j += WIDTH) {
                const floats v = part<Kind>(from, j, width, 0.0f);
                squares = fused(v, v, squares);
            }
            const float inverse = 1.0f / std::sqrt(sum_of(squares) / width + eps);
            const floats by = all(inverse);
            for (int64_t j = 0; j < width; j += WIDTH) {
                floats v = part<Kind>(from, j, width, 0.0f) * by;
                if (gain) v *= part<Single>(gain, j, width, 0.0f);
                put<Kind>(to, j, width, v);
            }
            inverses[row] = inverse;
        }
    }
}

// With d = dy · gain, r = 1/rms: dx = r (d − x r² mean(d x)), and of the gain, over all rows, Σ dy x r: each chunk of rows adds up its own.
template <class Kind>
void norm_backward(
    const Rows& rows, int64_t width, const typename Kind::number* d_y, const typename Kind::number* x, const float* gain,
    const float* inverses, typename Kind::number* d_x, float* d_gains, int64_t chunks, const int64_t* strides, int threads) {
    const int64_t all_rows = rows.count(), each = (all_rows + chunks - 1) / chunks;
#pragma omp parallel for num_threads(threads) schedule(static) if (all_rows * width > FEW)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float* sums = d_gains ? d_gains + chunk * width : nullptr;
        if (sums) std::memset(sums, 0, width * sizeof(float));
        Place place(rows, chunk * each);
        for (int64_t row = chunk * each; row < std::min(all_rows, (chunk + 1) * each); ++row, place.next()) {
            const auto* upstream = place.in(d_y, strides);
            const auto* from = place.in(x, strides + 3);
            auto* to = place.in(d_x, strides + 6);
            floats dots{};
            for (int64_t j = 0; j < width; j += WIDTH) {
                floats d = part<Kind>(upstream, j, width, 0.0f);
                if (gain) d *= part<Single>(gain, j, width, 0.0f);
                dots = fused(d, part<Kind>(from, j, width, 0.0f), dots);
            }
            const float inverse = inverses[row];
            const floats r = all(inverse), back = all(-inverse * inverse * (sum_of(dots) / width));
            for (int64_t j = 0; j < width; j += WIDTH) {
                const floats v = part<Kind>(from, j, width, 0.0f);
                floats d = part<Kind>(upstream, j, width, 0.0f);
                if (sums) put<Single>(sums, j, width, fused(d, v * r, part<Single>(sums, j, width, 0.0f)));
                if (gain) d *= part<Single>(gain, j, width, 0.0f);
                put<Kind>(to, j, width, fused(v, back, d) * r);
            }
        }
    }
}

// --- SwiGLU ---------------------------------------------------------------------------------------------------------------

// 1 / (1 + e^−x); e^−x is infinite where fp32 has no more numbers for it.
inline floats sigmoid(floats x) {
    const floats power = x * all(-LOG2E);
    const ints beyond = power > all(127.0f);
    const floats e = exp2_of(beyond ? all(127.0f) : power);
    return all(1.0f) / (all(1.0f) + (beyond ? all(-NONE) : e));
}

template <class Kind>
void gated(const typename Kind::number* gate_up, typename Kind::number* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > FEW)
    for (int64_t row = 0; row < rows; ++row) {
        const auto *gate = gate_up + row * 2 * width, *up = gate + width;
        for (int64_t j = 0; j < width; j += WIDTH) {
            const floats g = part<Kind>(gate, j, width, 0.0f);
            put<Kind>(out + row * width, j, width, g * sigmoid(g) * part<Kind>(up, j, width, 0.0f));
        }
    }
}

// d_up = d silu(g), d_gate = d u σ(g) (1 + g (1 − σ(g))).
template <class Kind>
void gated_backward(
    const typename Kind::number* d_out, const typename Kind::number* gate_up, typename Kind::number* d_gate_up, int64_t rows,
    int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > FEW)
    for (int64_t row = 0; row < rows; ++row) {
        const auto *gate = gate_up + row * 2 * width, *up = gate + width;
        auto *d_gate = d_gate_up + row * 2 * width, *d_up = d_gate + width;
        for (int64_t j = 0; j < width; j += WIDTH) {
            const floats g = part<Kind>(gate, j, width, 0.0f), u = part<Kind>(up, j, width, 0.0f);
            const floats d = part<Kind>(d_out + row * width, j, width, 0.0f), s = sigmoid(g), one = all(1.0f);
            put<Kind>(d_up, j, width, d * (g * s));
            put<Kind>(d_gate, j, width, d * u * (s * fused(g, one - s, one)));
        }
    }
}

// --- RoPE -----------------------------------------------------------------------------------------------------------------

// One head: pair (a, b) becomes (a cos − b sin, a sin + b cos).
template <class Kind>
inline void turn_head(
    const typename Kind::number* from, typename Kind::number* to, const float* cos, const float* sin, int64_t half, bool interleaved,
    float sign) {
    if (interleaved) {
        for (int64_t i = 0; i < half; ++i) {
            const float a = Kind::widened(from[2 * i]), b = Kind::widened(from[2 * i + 1]), c = cos[i], s = sign * sin[i];
            to[2 * i] = Kind::rounded(a * c - b * s);
            to[2 * i + 1] = Kind::rounded(a * s + b * c);
        }
        return;
    }
    for (int64_t i = 0; i < half; i += WIDTH) {
        const floats a = part<Kind>(from, i, half, 0.0f), b = part<Kind>(from + half, i, half, 0.0f);
        const floats c = part<Single>(cos, i, half, 0.0f), s = part<Single>(sin, i, half, 0.0f) * all(sign);
        put<Kind>(to, i, half, a * c - b * s);
        put<Kind>(to + half, i, half, a * s + b * c);
    }
}

struct Turn {
    int64_t batch, length, half, table_rows;
    bool interleaved, back;
};

template <class Kind>
void turn(
    const Turn& t, int tensors, const void* const* from, void* const* to, const int64_t* strides, const int64_t* heads, int turned,
    const float* cos, const float* sin, int threads) {
    typedef typename Kind::number number;
    int64_t all_heads = 0;
    for (int n = 0; n < tensors; ++n) all_heads += heads[n];
#pragma omp parallel for num_threads(threads) schedule(static) if (t.batch * t.length * all_heads * t.half > FEW)
    for (int64_t token = 0; token < t.batch * t.length; ++token) {
        const int64_t b = token / t.length, place = token % t.length;
        const int64_t angle = ((t.table_rows == 1 ? 0 : b) * t.length + place) * t.half;
        for (int n = 0; n < tensors; ++n) {
            const int64_t* s = strides + 6 * n;  // of batch, head and token: from, to
            const number* source = static_cast<const number*>(from[n]) + b * s[0] + place * s[2];
            number* target = static_cast<number*>(to[n]) + b * s[3] + place * s[5];
            for (int64_t h = 0; h < heads[n]; ++h) {
                if (n < turned) {
                    const float sign = t.back ? -1.0f : 1.0f;
                    turn_head<Kind>(source + h * s[1], target + h * s[4], cos + angle, sin + angle, t.half, t.interleaved, sign);
                } else {
                    std::memcpy(target + h * s[4], source + h * s[1], 2 * t.half * sizeof(number));
                }
            }
        }
    }
}

template <class T> inline const T* read(const void* p) { return static_cast<const T*>(p); }
template <class T> inline T* written(void* p) { return static_cast<T*>(p); }
typedef Chosen::number number;

}  // namespace

extern "C" {

// size: of three dimensions of rows, and the rows' width. strides: three each of x and y; numbers of a row lie side by side. gain: fp32, or null.
// inverses: 1/rms of every row, is written.
void rms_norm(
    const void* x, const float* gain, void* y, float* inverses, const int64_t* size, const int64_t* strides, float eps, int threads) {
    const Rows rows{{size[0], size[1], size[2]}};
    norm<Chosen>(rows, size[3], read<number>(x), gain, written<number>(y), inverses, strides, eps, threads);
}

// strides: of d_y, x and d_x. d_gains: (chunks, width), is written, its sum over the chunks is the gain's gradient; or null.
void rms_norm_backward(
    const void* d_y, const void* x, const float* gain, const float* inverses, void* d_x, float* d_gains, int64_t chunks,
    const int64_t* size, const int64_t* strides, int threads) {
    const Rows rows{{size[0], size[1], size[2]}};
    norm_backward<Chosen>(
        rows, size[3], read<number>(d_y), read<number>(x), gain, inverses, written<number>(d_x), d_gains, chunks, strides, threads);
}

// gate_up: (rows, 2 width), out: (rows, width), contiguous.
void swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, int threads) {
    gated<Chosen>(read<number>(gate_up), written<number>(out), rows, width, threads);
}

void swiglu_backward(const void* d_out, const void* gate_up, void* d_gate_up, int64_t rows, int64_t width, int threads) {
    gated_backward<Chosen>(read<number>(d_out), read<number>(gate_up), written<number>(d_gate_up), rows, width, threads);
}

// Heads of some tensors, from one place each to another; the first `turned` are turned, the others copied. size: batch, length, half a head's width,
// rows of the tables (1: the same for the whole batch). strides: six per tensor, of batch, head and token, where they come from and where they go.
// back: by the negative angle.
void turn_heads(
    int tensors, const void* const* from, void* const* to, const int64_t* strides, const int64_t* heads, int turned,
    const float* cos, const float* sin, const int64_t* size, int interleaved, int back, int threads) {
    const Turn t{size[0], size[1], size[2], size[3], interleaved != 0, back != 0};
    turn<Chosen>(t, tensors, from, to, strides, heads, turned, cos, sin, threads);
}
}
