// Sparse solutions of one sample after another; included once for each instruction set. reference.py says what is done.
// VECTOR: bytes of a register; BLOCK: registers that sum a piece of the product.
#include "../support_solve/cholesky.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// What is the same for all samples. Rows of both matrices are `stride` entries apart, zero beyond n.
template <typename T>
struct Plan {
  i64 n, stride, rank, iterations, most;
  const float* guiding;
  const T* exact;
  float density, share, doubt;
  T rounding, pivot, longest, least;
};

// Numbers that a thread works on, each `stride` long but for the triangle.
template <typename T>
struct Room {
  float *seen, *image, *message, *mean, *next, *likely, *values;
  T *target, *answer, *solved, *weights, *triangle;
  i64* kept;
};

// e^x for x up to 40, and e^-40 below -40: probabilities times squares stay clear of numbers too small for full speed.
float exponential(float x) {
  x = x < -40.0f ? -40.0f : x;
  const float scaled = x * 1.44269504f;
  const float whole = (scaled + 12582912.0f) - 12582912.0f;  // nearest integer: 1.5 * 2^23 leaves no room for fractions
  const float f = (scaled - whole) * 0.693147181f;
  const float p = 1 + f * (1 + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * 0.00833333333f))));
  const int32_t bits = ((int32_t)whole + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Sums over the entries of one sample: p, p q^2, p (1 - p) q^2, and p of those that are likelier zero.
struct Posterior {
  float count, energy, unsure, missed;
};

// q = message + (seen - image) back, in the message's place; likely = probability that q is no zero; mean = a likely q.
Posterior denoise(i64 n, const float* __restrict seen, const float* __restrict image, float* __restrict message,
                  float back, float odds, float slope, float a, float* __restrict likely, float* __restrict mean) {
  float count = 0, energy = 0, unsure = 0, missed = 0;
#pragma omp simd reduction(+ : count, energy, unsure, missed)
  for (i64 i = 0; i < n; i++) {
    const float q = message[i] + (seen[i] - image[i]) * back;
    const float power = q * q;
    const float p = 1 / (1 + exponential(-odds - slope * power));
    const float weighed = p * power;
    count += p;
    energy += weighed;
    unsure += weighed - p * weighed;
    missed += p > 0.5f ? 0.0f : p;
    message[i] = q;
    likely[i] = p;
    mean[i] = a * p * q;
  }
  return {count, energy, unsure, missed};
}

// message = what the denoiser knows that q did not, (x - u q) / (1 - u), in q's place; image = the projection of it, as
// that of q follows from that of the message before.
void extrinsic(i64 n, const float* __restrict seen, const float* __restrict likely, const float* __restrict mean,
               const float* __restrict projected, float cut, float back, float u, float* __restrict message,
               float* __restrict image) {
  const float rest = 1 / (1 - u);
#pragma omp simd
  for (i64 i = 0; i < n; i++) {
    const float x = likely[i] > cut ? mean[i] : 0, turned = image[i] + (seen[i] - image[i]) * back;
    message[i] = (x - u * message[i]) * rest;
    image[i] = (projected[i] - u * turned) * rest;
  }
}

// out = in * factor, from one type to another.
template <typename From, typename To>
void scaled(i64 n, const From* __restrict in, From factor, To* __restrict out) {
#pragma omp simd
  for (i64 i = 0; i < n; i++) out[i] = (To)(in[i] * factor);
}

// |a - b|^2.
template <typename T>
T distance(i64 n, const T* __restrict a, const T* __restrict b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}

// Which of 16 numbers are above a limit, one bit each.
uint32_t above16(const float* p, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_set1_ps(limit), _CMP_GT_OQ);
#elif defined(__AVX2__)
  const __m256 level = _mm256_set1_ps(limit);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p), level, _CMP_GT_OQ));
  return low | _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p + 8), level, _CMP_GT_OQ)) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= (uint32_t)(p[i] > limit) << i;
  return bits;
#endif
}

// Writes the places of numbers above a limit and returns how many there are; n is a multiple of 16.
i64 above(i64 n, const float* p, float limit, i64* at) {
  i64 count = 0;
  for (i64 i = 0; i < n; i += 16)
    for (uint32_t bits = above16(p + i, limit); bits; bits &= bits - 1) at[count++] = i + __builtin_ctz(bits);
  return count;
}

// out[first ...] = sum over j of weights[j] * rows[at[j]], V registers wide.
template <typename T, int V>
void piece(const T* rows, i64 stride, i64 first, i64 k, const i64* at, const T* weights, T* out) {
  typedef T Lanes __attribute__((vector_size(VECTOR), aligned(alignof(T)), may_alias));
  constexpr i64 WIDE = VECTOR / sizeof(T);
  Lanes sum[V] = {};
  for (i64 j = 0; j < k; j++) {
    const T* row = rows + at[j] * stride + first;
    const T weight = weights[j];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sum[v] += weight * *(const Lanes*)(row + v * WIDE);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) *(Lanes*)(out + first + v * WIDE) = sum[v];
}

// out = sum over j of weights[j] * rows[at[j]]; the stride is a multiple of 64 bytes.
template <typename T>
void combine(const T* rows, i64 stride, i64 k, const i64* at, const T* weights, T* out) {
  constexpr i64 WIDE = VECTOR / sizeof(T);
  i64 first = 0;
  for (; first + BLOCK * WIDE <= stride; first += BLOCK * WIDE)
    piece<T, BLOCK>(rows, stride, first, k, at, weights, out);
  for (; first + 4 * WIDE <= stride; first += 4 * WIDE) piece<T, 4>(rows, stride, first, k, at, weights, out);
  for (; first < stride; first += WIDE) piece<T, 1>(rows, stride, first, k, at, weights, out);
}

// Least squares on the support of `k` entries in room.kept: into room.answer, their image into room.solved. Returns
// whether they explain y down to rounding; sane: whether the system was regular and they are not far longer than y.
template <typename T>
bool explained(const Plan<T>& plan, Room<T>& room, i64 k, T size, bool* sane) {
  memset(room.answer, 0, sizeof(T) * plan.stride);
  *sane = solve_one<T>(k, plan.exact, plan.stride, room.kept, room.target, room.answer, room.triangle, plan.pivot);
  if (!*sane) return false;
  T length = 0;
  for (i64 j = 0; j < k; j++) {
    room.weights[j] = room.answer[room.kept[j]];
    length += room.weights[j] * room.weights[j];
  }
  *sane = sqrt(length) <= plan.longest * size;
  if (!*sane) return false;
  combine<T>(plan.exact, plan.stride, k, room.kept, room.weights, room.solved);
  return sqrt(distance(plan.n, room.target, room.solved)) <= plan.rounding * size;
}

// One sample: y = A^+ b (n) in, x (n) out. Returns whether x explains y down to rounding.
template <typename T>
bool recover_one(const Plan<T>& plan, Room<T>& room, const T* y, T* x, i64* steps) {
  const i64 n = plan.n;
  memset(x, 0, sizeof(T) * n);
  *steps = 0;
  T largest = 0, finite = 0;
#pragma omp simd reduction(max : largest) reduction(+ : finite)
  for (i64 i = 0; i < n; i++) {
    largest = y[i] > largest ? y[i] : -y[i] > largest ? -y[i] : largest;
    finite += y[i] * 0;
  }
  if (largest == 0 && finite == 0) return true;
  // 1 / largest is a number of T
  if (!(largest > plan.least && largest < 1 / plan.least && finite == 0)) return false;
  // from here on y has mean square n / rank: neither large nor small numbers are squared
  scaled(n, y, 1 / largest, room.target);
  memset(room.solved, 0, sizeof(T) * plan.stride);
  const T size = sqrt((T)plan.rank), factor = size / sqrt(distance(n, room.target, room.solved));
  const T unit = largest / factor;
  scaled(n, room.target, factor, room.seen);
  for (i64 i = 0; i < n; i++) room.target[i] *= factor;
  memset(room.image, 0, sizeof(float) * plan.stride);
  memset(room.message, 0, sizeof(float) * plan.stride);
  const float c = (float)plan.rank / (float)n, back = 1 / c;
  float density = plan.density, spread = 1 / density;
  for (i64 k = 0; k < plan.iterations; k++) {
    *steps = k + 1;
    float e = distance(n, room.seen, room.image) / (float)plan.rank * (1 - c) / c;
    if (e < 1e-14f) e = 1e-14f;
    const float a = spread / (spread + e);
    const float log_odds = logf(density / (1 - density)) + 0.5f * logf(e / (spread + e));
    const float odds = log_odds < -40 ? -40 : log_odds, slope = 0.5f * a / e;
    const Posterior found =
        denoise(n, room.seen, room.image, room.message, back, odds, slope, a, room.likely, room.mean);
    i64 chosen = found.missed < plan.doubt ? above(plan.stride, room.likely, 0.5f, room.kept) : 0;
    if (chosen && chosen <= plan.most) {
      bool sane;
      if (explained(plan, room, chosen, size, &sane)) {
        // entries of the support that are none come out as rounding
        T top = 0;
        for (i64 j = 0; j < chosen; j++) top = fabs(room.weights[j]) > top ? fabs(room.weights[j]) : top;
        for (i64 j = 0; j < chosen; j++)
          if (fabs(room.weights[j]) > plan.rounding * top) x[room.kept[j]] = room.weights[j] * unit;
        return true;
      }
      if (sane) {
        // least squares leave far less than the step did: go on from them
        scaled(n, room.answer, (T)1, room.message);
        scaled(n, room.solved, (T)1, room.image);
        continue;
      }
    }
    float u = (a * found.count + a * a / e * found.unsure) / (float)n;
    u = u < 1e-12f ? 1e-12f : u > 1 - 1e-6f ? 1 - 1e-6f : u;
    const float count = found.count < 1e-6f * (float)n ? 1e-6f * (float)n : found.count;
    density = count / (float)n < 0.999f ? count / (float)n : 0.999f;
    spread = a * a * found.energy / count + a * e;
    const float cut = plan.share * density;
    chosen = above(plan.stride, room.likely, cut, room.kept);
    for (i64 j = 0; j < chosen; j++) room.values[j] = room.mean[room.kept[j]];
    combine<float>(plan.guiding, plan.stride, chosen, room.kept, room.values, room.next);
    extrinsic(n, room.seen, room.likely, room.mean, room.next, cut, back, u, room.message, room.image);
  }
  // what ran away says nothing: the shortest solution does
  float length = 0;
  for (i64 i = 0; i < n; i++) length += room.mean[i] * room.mean[i];
  const bool sane = sqrtf(length) <= (float)(plan.longest * size);
  for (i64 i = 0; i < n; i++) x[i] = sane ? (T)room.mean[i] * unit : y[i];
  return false;
}

template <typename T>
int recover_all(const Plan<T>& plan, i64 batch, const T* y, T* x, i64* steps, unsigned char* found, int threads) {
  int memory = 0;
#pragma omp parallel num_threads(threads) reduction(max : memory)
  {
    const i64 long_ = plan.stride;
    float* f = (float*)calloc(7 * long_, sizeof(float));
    T* w = (T*)calloc(4 * long_ + scratch<T>(plan.most), sizeof(T));
    i64* kept = (i64*)calloc(long_, sizeof(i64));
    if (!f || !w || !kept) memory = 1;
    Room<T> room = {f, f + long_, f + 2 * long_, f + 3 * long_, f + 4 * long_, f + 5 * long_, f + 6 * long_,
                    w, w + long_, w + 2 * long_, w + 3 * long_, w + 4 * long_, kept};
#pragma omp for schedule(dynamic, 4)
    for (i64 i = 0; i < batch; i++)
      if (f && w && kept) found[i] = recover_one<T>(plan, room, y + i * plan.n, x + i * plan.n, steps + i);
    free(f);
    free(w);
    free(kept);
  }
  return memory;
}

}  // namespace

int JOIN(sparse_recovery, INSTRUCTIONS)(int wide, const i64* sizes, const double* numbers, const float* guiding,
                                        const void* exact, i64 batch, const void* y, void* x, i64* steps,
                                        unsigned char* found, int threads) {
  const float density = (float)numbers[0], share = (float)numbers[1], doubt = (float)numbers[2];
  if (wide) {
    const Plan<double> plan = {sizes[0], sizes[1], sizes[2], sizes[3],   sizes[4],   guiding, (const double*)exact,
                               density,  share,    doubt,    numbers[3], numbers[4], numbers[5], 1e-290};
    return recover_all<double>(plan, batch, (const double*)y, (double*)x, steps, found, threads);
  }
  const Plan<float> plan = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], guiding, (const float*)exact,
                            density, share, doubt, (float)numbers[3], (float)numbers[4], (float)numbers[5], 1e-30f};
  return recover_all<float>(plan, batch, (const float*)y, (float*)x, steps, found, threads);
}
