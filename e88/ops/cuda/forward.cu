// The forward pass for 16-bit inputs under tanh: y and the final state, and for training e_t and the state
// before every SEGMENT-th step. Sizes, letters and the lane layout are those of tile.cuh.
#include "tile.cuh"
#include "rows16.cuh"
#include "edges.cuh"

static_assert(CHUNK % SEGMENT == 0, "a chunk is whole segments");
constexpr int KEY_TASKS = (CHUNK * ROW_LANES + THREADS - 1) / THREADS;
// Columns are staged and written by eight.
constexpr int PIECES = CHUNK * COLS / 8, VALUE_TASKS = (PIECES + THREADS - 1) / THREADS;

struct Step {
  // Rows of k_s and q_{s-1} as fp16, scaled, interleaved (`pair_at`).
  u16 kq[2 * K];
  // Columns: v_s; y_{s-1}; e_s as fp16.
  u32 v[COLS / 16][8], y[COLS / 16][8], e[SAVE ? COLS / 16 : 1][8];
  // exp(g), the inverse scales of k_s and q_{s-1}, beta.
  float4 scalars;
};

// Tokens are counted through the whole batch: sequence n is tokens n * T to (n + 1) * T, or ends[n] to ends[n + 1].
// q, k, v: rows of H * K or H * V elements, consecutive tokens q_step, k_step, v_step elements apart.
// g (log decay) and beta: [tokens, H], rows scalar_step apart. y: [tokens, H, V]. States: [N, H, K, V]; null for zero or
// not wanted.
// written: e_t as fp16, [tokens, H, V]; with checkpoints: [tokens / SEGMENT + N, H, V, K], both only if SAVE; sequence n
// begins at row begin / SEGMENT + n.
// If FUSED: q, k, v, g and beta are raw (edges.cuh), with A_log and dt_bias [H] or null where g is the log decay. If GATE:
// y is gated by rows gate_step apart; ungated: y before that, if SAVE.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
e88_forward(const element* __restrict__ q, const element* __restrict__ k, const element* __restrict__ v,
            const head_scalar* __restrict__ g, const head_scalar* __restrict__ beta, const float* __restrict__ initial_state,
            const i64* __restrict__ ends, element* __restrict__ y, float* __restrict__ final_state,
            u16* __restrict__ written, u16* __restrict__ checkpoints, const float* __restrict__ A_log,
            const float* __restrict__ dt_bias, const element* __restrict__ output_gate, element* __restrict__ ungated,
            int q_step, int k_step, int v_step, int scalar_step, int gate_step, int T, int H) {
  // One step more than is filled: a loop looks one step ahead, and drops what it made of the last.
  __shared__ __align__(16) Step sm[CHUNK + 1];
  const int tid = threadIdx.x, lane = tid & 31, group = lane >> 2, t = lane & 3;
  const int tile0 = tid / 32 * TILES, column = 16 * tile0 + group;
  const int first = blockIdx.x % SPLITS * COLS, sequence = blockIdx.x / SPLITS / H, head = blockIdx.x / SPLITS % H;
  const i64 begin = ends ? ends[sequence] : (i64)sequence * T;
  const int length = ends ? (int)(ends[sequence + 1] - begin) : T;
  const i64 state_at = ((i64)sequence * H + head) * K * V + first;

  q += begin * q_step + head * K;
  k += begin * k_step + head * K;
  v += begin * v_step + head * V + first;
  g += begin * scalar_step + head;
  if (BETA) beta += begin * scalar_step + head;
  y += (begin * H + head) * V + first;
  if (GATE) output_gate += begin * gate_step + head * V + first;
  if (GATE && SAVE) ungated += (begin * H + head) * V + first;
  const Decay decay(A_log, dt_bias, head);
  if (SAVE) written += (begin * H + head) * V + first;
  if (SAVE) checkpoints += ((begin / SEGMENT + sequence) * H + head) * K * V + (i64)first * K;

  float S[TILES][2][ROWS];
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int j = column + 16 * m + 8 * c;
        // fp16 copies of the state are taken; a state beyond their range saturates tanh all the same.
        S[m][c][r] = initial_state && first + j < V
                         ? fminf(fmaxf(initial_state[state_at + row_of(r, t) * V + j], -65504.f), 65504.f) : 0.f;
      }

  // Step s reads with k_s and, from the same product, y_{s-1} with q_{s-1}: q lags by one, and one more step than
  // there are tokens finishes the last output.
  uint4 next_k[KEY_TASKS], next_q[KEY_TASKS];
  uint4 next_v[VALUE_TASKS];
  float next_decay = 0, next_beta = 0;
  auto fetch = [&](int s0) {
#pragma unroll
    for (int n = 0; n < KEY_TASKS; n++) {
      int x = tid + n * THREADS, s = s0 + x / ROW_LANES, i = x % ROW_LANES * 8;
      bool inside = x < CHUNK * ROW_LANES && i < K;
      next_k[n] = load_8(k + (i64)s * k_step + i, inside && s < length);
      next_q[n] = load_8(q + (i64)(s - 1) * q_step + i, inside && s > 0 && s <= length);
    }
#pragma unroll
    for (int n = 0; n < VALUE_TASKS; n++) {
      int x = tid + n * THREADS, s = s0 + x / (COLS / 8), j = x % (COLS / 8) * 8;
      bool inside = (PIECES % THREADS == 0 || x < PIECES) && s < length && (V % COLS == 0 || first + j < V);
      next_v[n] = load_8(v + (i64)s * v_step + j, inside);
    }
    if (tid < CHUNK && s0 + tid < length) {
      next_decay = load_head_scalar(g + (i64)(s0 + tid) * scalar_step);
      if (BETA) next_beta = load_head_scalar(beta + (i64)(s0 + tid) * scalar_step);
    }
  };
  fetch(0);
  for (int s0 = 0; s0 <= length; s0 += CHUNK) {
#pragma unroll
    for (int n = 0; n < KEY_TASKS; n++) {
      int x = tid + n * THREADS, s = x / ROW_LANES, i = x % ROW_LANES * 8;
      float k_inverse = fp16_row(next_k[n]), q_inverse = fp16_row(next_q[n]);
      if (x < CHUNK * ROW_LANES && i < K) {
        *(uint4*)(sm[s].kq + pair_at(0, i)) = next_k[n];
        *(uint4*)(sm[s].kq + pair_at(1, i)) = next_q[n];
        if (i == 0) sm[s].scalars.y = k_inverse, sm[s].scalars.z = q_inverse;
      }
    }
#pragma unroll
    for (int n = 0; n < VALUE_TASKS; n++) {
      int x = tid + n * THREADS, j = x % (COLS / 8);
      // Whole warps, since lanes exchange columns; sizes without a warp's worth of pieces leave lanes with none.
      if (PIECES % THREADS == 0 || (x & ~31) < PIECES)
        store_half(sm[x / (COLS / 8)].v[j / 2], activated(next_v[n]), j % 2, PIECES % 32 == 0 || x < PIECES);
    }
    if (tid < CHUNK) sm[tid].scalars.x = expf(decay.log(next_decay)), sm[tid].scalars.w = write_gate(next_beta);
    __syncthreads();
    uint4 gates[VALUE_TASKS];
    if (GATE)
#pragma unroll
      for (int n = 0; n < VALUE_TASKS; n++) {
        int x = tid + n * THREADS, s = s0 - 1 + x / (COLS / 8), j = x % (COLS / 8) * 8;
        bool inside = x < PIECES && s >= 0 && s < length && (V % COLS == 0 || first + j < V);
        gates[n] = load_8(output_gate + (i64)s * gate_step + j, inside);
      }
    if (s0 + CHUNK <= length) fetch(s0 + CHUNK);

    const int steps = min(CHUNK, length - s0);
    u32 x[ROWS / 2];
    float dot[TILES][4];
    load_pairs(x, sm[0].kq, group & 1, t);
#pragma unroll
    for (int m = 0; m < TILES; m++) dot_rows(dot[m], S[m], x);
#pragma unroll 1
    for (int part = 0; part < steps; part += SEGMENT) {
      if (SAVE) {
        u16* row = checkpoints + (i64)((s0 + part) / SEGMENT) * (H * K * V);
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            int j = column + 16 * m + 8 * c;
            if (V % COLS == 0 || first + j < V) save_column(row + j * K, t, S[m][c]);
          }
      }
      const int end = min(part + SEGMENT, steps);
      // The products of the next step close the loop, so that they overlap this step's activations.
#pragma unroll 1
      for (int s = part; s < end; s++) {
        u32 packed[ROWS / 2];
        float key[ROWS];
        Step& step = sm[s];
        float4 scalar = step.scalars;
        if (FUSED) scalar.y = scalar.z = 1;
        load_pairs(packed, step.kq, 0, t);
        unpack_rows(key, packed);
        load_pairs(x, sm[s + 1].kq, group & 1, t);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const u32 out = pack_output(dot[m][1] * scalar.z, dot[m][3] * scalar.z);
          if (t == 0) step.y[tile0 + m][group] = out;
          float e[2];
          unpack_input(step.v[tile0 + m][group], e[0], e[1]);
#pragma unroll
          for (int c = 0; c < 2; c++) e[c] -= dot[m][2 * c] * scalar.y;
          if (SAVE && t == 0) step.e[SAVE ? tile0 + m : 0][group] = pack_fp16_finite(e[0], e[1]);
#pragma unroll
          for (int c = 0; c < 2; c++) e[c] *= BETA ? scalar.w * scalar.y : scalar.y;
#pragma unroll
          for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2; c++) S[m][c][r] = fast_tanh(scalar.x * S[m][c][r] + key[r] * e[c]);
          dot_rows(dot[m], S[m], x);
        }
      }
    }
    if (t == 0 && steps < CHUNK)
#pragma unroll
      for (int m = 0; m < TILES; m++)
        sm[steps].y[tile0 + m][group] =
            pack_output(dot[m][1] * sm[steps].scalars.z, dot[m][3] * sm[steps].scalars.z);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < VALUE_TASKS; n++) {
      int x = tid + n * THREADS, s = s0 - 1 + x / (COLS / 8), piece = x % (COLS / 8), j = 8 * piece;
      if (x >= PIECES || s >= length || (V % COLS != 0 && first + j >= V)) continue;
      const Step& step = sm[x / (COLS / 8)];
      const i64 at = (i64)s * (H * V) + j;
      // Outputs lag by one step, e does not.
      if (SAVE && s + 1 < length) store_8(written + at + H * V, load_half(step.e[SAVE ? piece / 2 : 0], piece % 2));
      if (s < 0) continue;
      uint4 out = load_half(step.y[piece / 2], piece % 2);
      if (GATE && SAVE) store_8(ungated + at, out);
      store_8(y + at, GATE ? gated(out, gates[n]) : out);
    }
  }

  if (final_state)
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          int j = column + 16 * m + 8 * c;
          if (first + j < V) final_state[state_at + row_of(r, t) * V + j] = S[m][c][r];
        }
}
