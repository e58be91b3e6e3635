// log Σ exp(logit) − logit of the target, row by row on a CPU, and the gradient in the logits' place. The formula: cross_entropy.py.
//
//     row  ■ ■ ■ ■ ■ ■ ■ ■   read for its maximum, read for Σ exp, written: a row stays in the second cache, so memory gives it once and
//     row  ■ ■ ■ ■ ■ ■ ■ ■   takes it back once. Meanwhile its exponentials wait in fp32, in a row that the thread keeps for that.
//     …                      A thread takes rows.

#include "vectors.h"

namespace {

struct Row {
    float loss, log_total;
};

// The difference comes before the product with log2 e, which would cost large logits their digits.
template <class Kind>
Row loss_of(typename Kind::number* logits, ptrdiff_t vocab, int64_t target, float factor, float z_loss, bool gradient, float* waiting) {
    constexpr float LN2 = 0.6931471805599453f;
    floats bests = all(NONE);
    for (ptrdiff_t j = 0; j < vocab; j += WIDTH) {
        const floats x = part<Kind>(logits, j, vocab, NONE);
        bests = x > bests ? x : bests;
    }
    const float best = largest_of(bests);
    const floats less = all(best), by = all(factor * LOG2E);
    floats sums{};
    for (ptrdiff_t j = 0; j < vocab; j += WIDTH) {
        const floats p = exp2_of((part<Kind>(logits, j, vocab, NONE) - less) * by);
        if (gradient) store(waiting + j, p);
        sums += p;
    }
    const float total = sum_of(sums), chosen = Kind::widened(logits[target]);
    const Row found{std::log2(total) * LN2 - (chosen - best) * factor, std::log2(total) * LN2 + best * factor};
    if (!gradient) return found;
    const float share = factor * (1.0f + 2.0f * z_loss * found.log_total);
    const floats times = all(share / total);
    ptrdiff_t j = 0;
    for (; j + WIDTH <= vocab; j += WIDTH) Kind::rounded(logits + j, load<floats>(waiting + j) * times);
    for (; j < vocab; ++j) logits[j] = Kind::rounded(waiting[j] * times[0]);
    logits[target] = Kind::rounded(waiting[target] * times[0] - factor);
    return found;
}

template <class Kind>
int64_t losses(
    typename Kind::number* logits, const int64_t* targets, int64_t rows, int64_t vocab, int64_t ignored, float factor,
    float z_loss, bool gradient, float* nats, float* objective, void* memory, int threads) {
    int64_t strange = 0;
#pragma omp parallel num_threads(threads) reduction(+ : strange)
    {
        float* waiting = static_cast<float*>(memory) + omp_get_thread_num() * up(vocab, 16);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            nats[r] = objective[r] = 0.0f;
            typename Kind::number* row = logits + r * vocab;
            if (targets[r] == ignored) {
                if (gradient) std::memset(row, 0, vocab * sizeof(*row));
                continue;
            }
            if (targets[r] < 0 || targets[r] >= vocab) {
                ++strange;
                continue;
            }
            const Row found = loss_of<Kind>(row, vocab, targets[r], factor, z_loss, gradient, waiting);
            nats[r] = found.loss;
            objective[r] = found.loss + z_loss * found.log_total * found.log_total;
        }
    }
    return strange;
}

}  // namespace

extern "C" {

// logits: (rows, vocab), each row behind the other; they become their gradient, if `gradient`. nats, objective: per row, are written.
// memory: vocab numbers of fp32 per thread, up to a multiple of 16. Returns how many targets are none of the vocabulary's and not `ignored`: their rows are left as they were.
int64_t cross_entropy(
    void* logits, const int64_t* targets, int64_t rows, int64_t vocab, int64_t ignored, float factor, float z_loss,
    int gradient, float* nats, float* objective, void* memory, int threads) {
    return losses<Chosen>(
        static_cast<Chosen::number*>(logits), targets, rows, vocab, ignored, factor, z_loss, gradient != 0, nats, objective,
        memory, threads);
}
}
