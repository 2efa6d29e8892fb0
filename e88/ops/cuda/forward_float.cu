// The forward pass: y and the final state, and for training the state before every SEGMENT-th step.
// Sizes, letters and the lane layout are those of tile.cuh.
#include "tile.cuh"
#include "tiles32.cuh"

static_assert(CHUNK % SEGMENT == 0, "a chunk is whole segments");
constexpr int KEY_PIECES = (CHUNK * K / 8 + THREADS - 1) / THREADS;
constexpr int VALUE_PIECES = (CHUNK * COLS / 8 + THREADS - 1) / THREADS;

struct Shared {
  // One row more than is filled: a loop looks one step ahead, and drops what it made of the last row.
  float k[CHUNK + 1][K], q[CHUNK + 1][K], v[CHUNK][COLS];
  float decay[CHUNK], beta[CHUNK];
  float y[CHUNK][COLS];
};

// Tokens are counted through the whole batch: sequence n is tokens n * T to (n + 1) * T, or ends[n] to ends[n + 1].
// q, k, v: rows of H * K or H * V elements, consecutive tokens q_step, k_step, v_step elements apart.
// g (log decay) and beta: [tokens, H]. y: [tokens, H, V]. States: [N, H, K, V]; null for zero or not wanted.
// checkpoints: [tokens / SEGMENT + N, H, V, K] or null; sequence n begins at row begin / SEGMENT + n.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
e88_forward(const element* __restrict__ q, const element* __restrict__ k, const element* __restrict__ v,
            const float* __restrict__ g, const float* __restrict__ beta, const float* __restrict__ initial_state,
            const i64* __restrict__ ends, element* __restrict__ y, float* __restrict__ final_state,
            float* __restrict__ checkpoints, int q_step, int k_step, int v_step, int T, int H) {
  __shared__ __align__(16) Shared sm;
  const int tid = threadIdx.x, lane = tid & 31, group = lane >> 2, t = lane & 3;
  const int column = tid / 32 * 16 * TILES + group;
  const int first = blockIdx.x % SPLITS * COLS, sequence = blockIdx.x / SPLITS / H, head = blockIdx.x / SPLITS % H;
  const i64 begin = ends ? ends[sequence] : (i64)sequence * T;
  const int length = ends ? (int)(ends[sequence + 1] - begin) : T;
  const i64 state_at = ((i64)sequence * H + head) * K * V + first;

  q += begin * q_step + head * K;
  k += begin * k_step + head * K;
  v += begin * v_step + head * V + first;
  g += begin * H + head;
  if (BETA) beta += begin * H + head;
  y += (begin * H + head) * V + first;
  if (checkpoints) checkpoints += ((begin / SEGMENT + sequence) * H + head) * K * V + (i64)first * K;

  const float* pair = group & 1 ? sm.q[0] : sm.k[0];
  float S[TILES][2][ROWS];
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int j = column + 16 * m + 8 * c;
        S[m][c][r] = initial_state && first + j < V ? initial_state[state_at + row_of(r, t) * V + j] : 0.f;
      }

  // Step s reads with k_s and, from the same product, y_{s-1} with q_{s-1}: q lags by one, and one more step than
  // there are tokens finishes the last output.
  Piece next_k[KEY_PIECES], next_q[KEY_PIECES], next_v[VALUE_PIECES];
  float next_decay = 0, next_beta = 0;
  auto fetch = [&](int s0) {
#pragma unroll
    for (int n = 0; n < KEY_PIECES; n++) {
      int x = tid + n * THREADS, s = s0 + x / (K / 8), i = x % (K / 8) * 8;
      bool inside = x < CHUNK * K / 8;
      next_k[n] = inside && s < length ? load_piece(k + (i64)s * k_step + i) : zero_piece();
      next_q[n] = inside && s > 0 && s <= length ? load_piece(q + (i64)(s - 1) * q_step + i) : zero_piece();
    }
#pragma unroll
    for (int n = 0; n < VALUE_PIECES; n++) {
      int x = tid + n * THREADS, s = s0 + x / (COLS / 8), j = x % (COLS / 8) * 8;
      next_v[n] = x < CHUNK * COLS / 8 && s < length && first + j < V ? load_piece(v + (i64)s * v_step + j) : zero_piece();
    }
    if (tid < CHUNK && s0 + tid < length) {
      next_decay = g[(i64)(s0 + tid) * H];
      if (BETA) next_beta = beta[(i64)(s0 + tid) * H];
    }
  };
  fetch(0);
  for (int s0 = 0; s0 <= length; s0 += CHUNK) {
#pragma unroll
    for (int n = 0; n < KEY_PIECES; n++) {
      int x = tid + n * THREADS;
      if (CHUNK * K / 8 % THREADS == 0 || x < CHUNK * K / 8) {
        stage_piece(sm.k[0] + 8 * x, next_k[n]);
        stage_piece(sm.q[0] + 8 * x, next_q[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < VALUE_PIECES; n++) {
      int x = tid + n * THREADS;
      if (CHUNK * COLS / 8 % THREADS == 0 || x < CHUNK * COLS / 8) stage_piece(sm.v[0] + 8 * x, next_v[n]);
    }
    if (tid < CHUNK) sm.decay[tid] = expf(next_decay), sm.beta[tid] = next_beta;
    __syncthreads();
    if (s0 + CHUNK <= length) fetch(s0 + CHUNK);

    const int steps = min(CHUNK, length - s0);
    float x[ROWS], dot[TILES][4];
    load_rows(x, pair, t);
#pragma unroll
    for (int m = 0; m < TILES; m++) dot_rows<2>(dot[m], S[m], x);
#pragma unroll 1
    for (int part = 0; part < steps; part += SEGMENT) {
      if (checkpoints) {
        float* row = checkpoints + (i64)((s0 + part) / SEGMENT) * (H * K * V);
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            int j = column + 16 * m + 8 * c;
            if (V % COLS == 0 || first + j < V) store_column(row + j * K, t, S[m][c]);
          }
      }
      const int end = min(part + SEGMENT, steps);
      // The products of the next step close the loop, so that they overlap this step's activations.
#pragma unroll 1
      for (int s = part; s < end; s++) {
        float key[ROWS], e[TILES][2];
        load_rows(key, sm.k[s], t);
        load_rows(x, pair + (s + 1) * K, t);
        const float d = sm.decay[s];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          if (t == 0) sm.y[s][column + 16 * m] = dot[m][1], sm.y[s][column + 16 * m + 8] = dot[m][3];
#pragma unroll
          for (int c = 0; c < 2; c++) {
            e[m][c] = sm.v[s][column + 16 * m + 8 * c] - dot[m][2 * c];
            if (BETA) e[m][c] *= sm.beta[s];
          }
        }
#pragma unroll
        for (int m = 0; m < TILES; m++) {
#pragma unroll
          for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2; c++) S[m][c][r] = activate(d * S[m][c][r] + key[r] * e[m][c]);
          dot_rows<1>(dot[m], S[m], x);
        }
      }
    }
    if (t == 0 && steps < CHUNK)
#pragma unroll
      for (int m = 0; m < TILES; m++)
        sm.y[steps][column + 16 * m] = dot[m][1], sm.y[steps][column + 16 * m + 8] = dot[m][3];
    __syncthreads();
    for (int x = tid; x < CHUNK * COLS / 8; x += THREADS) {
      int s = s0 - 1 + x / (COLS / 8), j = x % (COLS / 8) * 8;
      if (s < 0 || s >= length || first + j >= V) continue;
      float out[8];
#pragma unroll
      for (int e = 0; e < 8; e++) out[e] = sm.y[0][8 * x + e];
      store_piece(y + (i64)s * (H * V) + j, out);
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
