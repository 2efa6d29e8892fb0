// One token of the recurrence with everything around it: SiLU and L2 norm of q and k, SiLU of v, decay, write gate,
// update, read and output gate. A warp owns COLUMNS = 4 * LANES columns of one head of one row: columns need nothing of
// one another. Lane = LANES * group + c holds ROWS consecutive rows i of columns 4 * c .. 4 * c + 3, so rows of the
// state are read in whole lines and sums over rows are ROWS additions and a few shuffles.
//
// Set by the host: K, V, DTYPE of q, k, v, b and gate (0 bf16, 1 fp16, 2 float32), A_DTYPE of a, TANH, TIED (v is
// k before its norm), DECAY (a is raw; otherwise the log decay), BETA, GATE.
#include "overlap.cuh"

constexpr int LANES = 4, COLUMNS = 4 * LANES;
constexpr int GROUPS = 32 / LANES;
constexpr int ROWS = K / GROUPS, OWN = (ROWS + LANES - 1) / LANES;
constexpr int SPLITS = (V + COLUMNS - 1) / COLUMNS;
static_assert(ROWS * GROUPS == K, "every group has as many rows");

template <int TYPE> struct Element { typedef u16 type; };
template <> struct Element<2> { typedef float type; };
typedef Element<DTYPE>::type element;
typedef Element<A_DTYPE>::type a_element;

template <int TYPE> DEVICE float number(typename Element<TYPE>::type x) {
  if constexpr (TYPE == 2) {
    return x;
  } else if constexpr (TYPE == 1) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  } else {
    return __uint_as_float((u32)x << 16);
  }
}
DEVICE element rounded(float x) {
#if DTYPE == 2
  return x;
#else
  u16 y;
#if DTYPE == 1
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
  return y;
#endif
}

DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// For 16-bit inputs the instruction that the kernels over whole sequences use, so that decoding goes on as they do. For
// float32 good to 3e-7 relative: near 0, where 1 - 2 / (e^2x + 1) would cancel, a polynomial fitted on |x| <= 0.5 instead.
DEVICE float activate(float x) {
  if (!TANH) return x;
  if (DTYPE != 2) {
    asm("tanh.approx.f32 %0, %0;" : "+f"(x));
    return x;
  }
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 2.885390082f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(power + 1.f));
  const float square = x * x;
  const float p = fmaf(square, fmaf(square, fmaf(square, 0.01725699f, -0.05305295f), 0.13325987f), -0.33333148f);
  return square > 0.25f ? fmaf(-2.f, inverse, 1.f) : fmaf(x * square, p, x);
}

// Sum over the lanes that differ in bits from FIRST up: over the groups for LANES, over all for 1. The same in all of them.
template <int FIRST> DEVICE float sum_over(float x) {
#pragma unroll
  for (int other = FIRST; other < 32; other *= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

// The rows of a group from its lanes, of which lane c has rows c, c + LANES, ...
DEVICE void gather(float (&rows)[ROWS], const float (&own)[OWN]) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) rows[r] = __shfl_sync(0xffffffffu, own[r / LANES], r % LANES, LANES);
}

// qkv: rows of 2 * H * K + H * V elements (2 * H * K where TIED). a, b: rows of H. gate: rows of H * V. The rows of a
// tensor are *_step elements apart. A_log, dt_bias: [H]. y: [B, H, V]. States [B, H, K, V], which may be one and the same.
// warps: B * H * SPLITS.
extern "C" __global__ void __launch_bounds__(128)
e88_step(const element* qkv, const a_element* a, const float* __restrict__ A_log, const float* __restrict__ dt_bias,
         const element* b, const element* gate, const float* state, element* y, float* new_state, i64 qkv_step,
         i64 a_step, i64 b_step, i64 gate_step, int H, int warps) {
  const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  let_next_begin();
  if (warp >= warps) return;
  const int lane = threadIdx.x % 32, first = lane / LANES * ROWS, c0 = lane % LANES;
  const int column = warp % SPLITS * COLUMNS + 4 * c0;
  const int head = warp / SPLITS % H;
  const i64 row = warp / SPLITS / H, at = ((row * H + head) * K + first) * V + column;
  const bool inside = V % COLUMNS == 0 || column < V;

  float4 S[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) S[r] = inside ? *(const float4*)(state + at + r * V) : make_float4(0, 0, 0, 0);
  float decay_rate = 0, bias = 0;
  if (DECAY) decay_rate = A_log[head], bias = dt_bias[head];
  // The state and the parameters above were written long before the launch that this one may overlap.
  wait_for_last();

  qkv += row * qkv_step;
  const element *q_row = qkv + head * K + first, *k_row = q_row + H * K;
  const element* v_row = qkv + (TIED ? H * K + head * K : 2 * H * K + head * V) + column;
  float own_q[OWN], own_k[OWN], q[ROWS], k[ROWS], e[4], open[4];
#pragma unroll
  for (int n = 0; n < OWN; n++) {
    const int r = c0 + n * LANES;
    own_q[n] = r < ROWS ? number<DTYPE>(q_row[r]) : 0;
    own_k[n] = r < ROWS ? number<DTYPE>(k_row[r]) : 0;
  }
#pragma unroll
  for (int c = 0; c < 4; c++) {
    e[c] = inside ? number<DTYPE>(v_row[c]) : 0;
    open[c] = GATE && inside ? number<DTYPE>(gate[row * gate_step + head * V + column + c]) : 0;
  }
  float log_decay = number<A_DTYPE>(a[row * a_step + head]);
  float write = BETA ? 1 / (1 + expf(-number<DTYPE>(b[row * b_step + head]))) : 1;
  if (DECAY) {
    float x = log_decay + bias;
    log_decay = -expf(decay_rate) * (x > 20 ? x : log1pf(expf(x)));
  }
  const float decay = expf(log_decay);

  float q_size = 0, k_size = 0;
#pragma unroll
  for (int n = 0; n < OWN; n++) {
    own_q[n] = silu(own_q[n]), own_k[n] = silu(own_k[n]);
    q_size += own_q[n] * own_q[n], k_size += own_k[n] * own_k[n];
  }
  const float q_scale = rsqrtf(sum_over<1>(q_size) + 1e-6f), k_scale = rsqrtf(sum_over<1>(k_size) + 1e-6f);
#pragma unroll
  for (int n = 0; n < OWN; n++) own_k[n] *= k_scale;
  gather(q, own_q);
  gather(k, own_k);

  float sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    sum[0] += S[r].x * k[r], sum[1] += S[r].y * k[r], sum[2] += S[r].z * k[r], sum[3] += S[r].w * k[r];
  }
#pragma unroll
  for (int c = 0; c < 4; c++) e[c] = write * (silu(e[c]) - sum_over<LANES>(sum[c])), sum[c] = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    S[r].x = activate(decay * S[r].x + k[r] * e[0]), S[r].y = activate(decay * S[r].y + k[r] * e[1]);
    S[r].z = activate(decay * S[r].z + k[r] * e[2]), S[r].w = activate(decay * S[r].w + k[r] * e[3]);
    sum[0] += S[r].x * q[r], sum[1] += S[r].y * q[r], sum[2] += S[r].z * q[r], sum[3] += S[r].w * q[r];
    if (inside) *(float4*)(new_state + at + r * V) = S[r];
  }
#pragma unroll
  for (int c = 0; c < 4; c++) {
    float out = sum_over<LANES>(sum[c]) * q_scale;
    if (GATE) out *= silu(open[c]);
    if (inside && first == 0) y[(row * H + head) * V + column + c] = rounded(out);
  }
}
