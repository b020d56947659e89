/* The ParaGRU and ParaLSTM in time order, forward and adjoint, for one CPU.

   Compiled on first use by cpu.py with the system's compiler; the equations are those of cells.py.

   Layout, all contiguous: gates [B][T][H][3][N]; output, cells and their gradients [B][T][D]; weights and
   bias [3][D], peephole [2][D]; state [B][D] (GRU) or [B][2][D] as c, h (LSTM); keep [B][T] bytes, 0 where a
   segment begins, or NULL. D = H N, channel d = h N + n.

   A task is some rows of the batch and some channels of one head. The cut depends on the shape alone, so that
   sums are the same for any number of threads. Within a task time is the outermost loop and channels are the
   innermost one, which the compiler vectorises; rows and channels together hide the latency of a step.
   exp is written out: a library's would be vectorised only under flags that change the arithmetic of the
   whole process (flush to zero) or forget about NaN. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define CHANNELS 256 /* most channels of a task */
#define LANES 512    /* rows times channels that a task aims for */
#define BLOCK 64     /* steps whose parameter gradients are summed before they join the total */

typedef struct {
    long batch, time, heads, width; /* width: channels of a head */
    long threads;
} Shape;

typedef struct {
    long row, rows, head, channel, channels, group;
} Task;

typedef struct {
    const float *gates, *recurrent, *peephole, *bias, *state;
    const uint8_t *keep;
} Inputs;

typedef struct {
    float *output, *cells, *final_state, *jacobian; /* jacobian: the greatest norm, one per task */
} Outputs;

typedef struct {
    const float *output, *cells, *grad, *grad_final;
    float *d_gates, *d_state;
    float *d_parameters; /* [groups][6 or 8][D]: recurrent, bias, then peephole */
} Adjoint;

static const float zeros[CHANNELS];

static inline float exponential(float x) {
    /* 2^n e^r with |r| <= ln 2 / 2; relative error 1e-7. NaN stays NaN. */
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the nearest integer */
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t exponent, bits;
    memcpy(&exponent, &shifted, 4);
    memcpy(&bits, &p, 4);
    bits += exponent << 23;
    memcpy(&p, &bits, 4);
    return p;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
static inline float hyperbolic(float x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }
static inline float magnitude(float x) { return x < 0.0f ? -x : x; }
/* Infinity for what is not a number: a maximum would pass over it. */
static inline float visible(float x) { return x == x ? x : INFINITY; }
static inline float greater(float a, float b) { return a > b ? a : b; }

static long ceil_div(long a, long b) { return (a + b - 1) / b; }

static long chunks_of(Shape s) { return ceil_div(s.width, CHANNELS); }

static long rows_of(Shape s) {
    long channels = s.width < CHANNELS ? s.width : CHANNELS;
    long rows = LANES / channels;
    return rows < 1 ? 1 : rows;
}

long newton_rnn_groups(const Shape *s) { return ceil_div(s->batch, rows_of(*s)); }
long newton_rnn_tasks(const Shape *s) { return newton_rnn_groups(s) * s->heads * chunks_of(*s); }

static Task task_of(Shape s, long index) {
    Task t;
    long chunk = index % chunks_of(s);
    index /= chunks_of(s);
    t.head = index % s.heads;
    t.group = index / s.heads;
    t.row = t.group * rows_of(s);
    t.rows = s.batch - t.row < rows_of(s) ? s.batch - t.row : rows_of(s);
    t.channel = chunk * CHANNELS;
    t.channels = s.width - t.channel < CHANNELS ? s.width - t.channel : CHANNELS;
    return t;
}

/* Where a task's piece of a row begins, for position (b, t). */
static inline long gate_at(Shape s, Task k, long b, long t) {
    return (((b * s.time + t) * s.heads + k.head) * 3) * s.width + k.channel;
}
static inline long state_at(Shape s, Task k, long b, long t) {
    return ((b * s.time + t) * s.heads + k.head) * s.width + k.channel;
}
static inline int is_cut(Shape s, Inputs in, long b, long t) { return in.keep && !in.keep[b * s.time + t]; }

/* The state before (b, t): of `states`, of the initial state, or zeros. */
static inline const float *previous(Shape s, Task k, Inputs in, const float *states, const float *initial,
                                    long b, long t) {
    if (is_cut(s, in, b, t)) return zeros;
    return t ? states + state_at(s, k, b, t - 1) : initial;
}

/* Sums of a task's parameter gradients: short sums first, so that long sequences lose no digits. */
typedef struct {
    float part[8][CHANNELS];
} Sums;

static void flush(Sums *sums, int count, float *total, long stride, long channels) {
    for (int i = 0; i < count; i++)
        for (long n = 0; n < channels; n++) {
            total[i * stride + n] += sums->part[i][n];
            sums->part[i][n] = 0.0f;
        }
}

static void gru_forward(Shape s, Task k, Inputs in, Outputs out, long index) {
    const long D = s.heads * s.width, N = s.width, d = k.head * N + k.channel;
    const float *a = in.recurrent + d, *bias = in.bias + d;
    float worst = 0.0f;
    for (long t = 0; t < s.time; t++)
        for (long b = k.row; b < k.row + k.rows; b++) {
            const float *x = in.gates + gate_at(s, k, b, t);
            const float *h = previous(s, k, in, out.output, in.state + b * D + d, b, t);
            float *restrict y = out.output + state_at(s, k, b, t);
#pragma omp simd reduction(max : worst)
            for (long n = 0; n < k.channels; n++) {
                float z = sigmoid(x[n] + bias[n] + a[n] * h[n]);
                float r = sigmoid(x[N + n] + bias[D + n] + a[D + n] * h[n]);
                float c = hyperbolic(x[2 * N + n] + bias[2 * D + n] + a[2 * D + n] * (r * h[n]));
                float j = (1 - z) + (c - h[n]) * z * (1 - z) * a[n] +
                          z * (1 - c * c) * a[2 * D + n] * (r + h[n] * r * (1 - r) * a[D + n]);
                y[n] = h[n] + z * (c - h[n]);
                worst = greater(visible(magnitude(j)), worst);
            }
        }
    for (long b = k.row; b < k.row + k.rows; b++)
        memcpy(out.final_state + b * D + d, out.output + state_at(s, k, b, s.time - 1), k.channels * 4);
    out.jacobian[index] = worst;
}

static void gru_backward(Shape s, Task k, Inputs in, Adjoint adj) {
    const long D = s.heads * s.width, N = s.width, d = k.head * N + k.channel;
    const float *a = in.recurrent + d, *bias = in.bias + d;
    float *total = adj.d_parameters + k.group * 6 * D + d;
    Sums sums;
    memset(&sums, 0, sizeof sums);
    for (long b = k.row; b < k.row + k.rows; b++)
        memcpy(adj.d_state + b * D + d, adj.grad_final + b * D + d, k.channels * 4);
    for (long t = s.time - 1; t >= 0; t--) {
        for (long b = k.row; b < k.row + k.rows; b++) {
            const float *x = in.gates + gate_at(s, k, b, t), *g = adj.grad + state_at(s, k, b, t);
            const float *h = previous(s, k, in, adj.output, in.state + b * D + d, b, t);
            const float pass = is_cut(s, in, b, t) ? 0.0f : 1.0f;
            float *restrict dx = adj.d_gates + gate_at(s, k, b, t), *restrict v = adj.d_state + b * D + d;
#pragma omp simd
            for (long n = 0; n < k.channels; n++) {
                float p = h[n], a_r = a[D + n], a_c = a[2 * D + n];
                float z = sigmoid(x[n] + bias[n] + a[n] * p);
                float r = sigmoid(x[N + n] + bias[D + n] + a_r * p);
                float c = hyperbolic(x[2 * N + n] + bias[2 * D + n] + a_c * (r * p));
                float w = g[n] + v[n];
                float dz = w * (c - p) * z * (1 - z), dc = w * z * (1 - c * c);
                float dr = dc * a_c * p * r * (1 - r);
                dx[n] = dz, dx[N + n] = dr, dx[2 * N + n] = dc;
                v[n] = pass * (w * (1 - z) + dz * a[n] + dc * a_c * r + dr * a_r);
                sums.part[0][n] += dz * p, sums.part[1][n] += dr * p, sums.part[2][n] += dc * (r * p);
                sums.part[3][n] += dz, sums.part[4][n] += dr, sums.part[5][n] += dc;
            }
        }
        if (t % BLOCK == 0) flush(&sums, 6, total, D, k.channels);
    }
}

static void lstm_forward(Shape s, Task k, Inputs in, Outputs out, long index) {
    const long D = s.heads * s.width, N = s.width, d = k.head * N + k.channel;
    const float *a = in.recurrent + d, *peep = in.peephole + d, *bias = in.bias + d;
    float worst = 0.0f;
    for (long t = 0; t < s.time; t++)
        for (long b = k.row; b < k.row + k.rows; b++) {
            const float *x = in.gates + gate_at(s, k, b, t), *initial = in.state + b * 2 * D + d;
            const float *q = previous(s, k, in, out.cells, initial, b, t);
            const float *p = previous(s, k, in, out.output, initial + D, b, t);
            float *restrict y = out.output + state_at(s, k, b, t), *restrict m = out.cells + state_at(s, k, b, t);
#pragma omp simd reduction(max : worst)
            for (long n = 0; n < k.channels; n++) {
                float f = sigmoid(x[n] + bias[n] + a[n] * p[n] + peep[n] * q[n]);
                float z = hyperbolic(x[2 * N + n] + bias[2 * D + n] + a[2 * D + n] * p[n]);
                float c = z + f * (q[n] - z);
                float o = sigmoid(x[N + n] + bias[D + n] + a[D + n] * p[n] + peep[D + n] * c);
                float th = hyperbolic(c), df = (q[n] - z) * f * (1 - f), dy = th * o * (1 - o);
                float h_by_c = dy * peep[D + n] + o * (1 - th * th);
                float cc = f + df * peep[n], ch = df * a[n] + (1 - f) * (1 - z * z) * a[2 * D + n];
                float row_c = magnitude(cc) + magnitude(ch);
                float row_h = magnitude(h_by_c * cc) + magnitude(h_by_c * ch + dy * a[D + n]);
                m[n] = c, y[n] = o * th;
                worst = greater(greater(visible(row_c), visible(row_h)), worst);
            }
        }
    for (long b = k.row; b < k.row + k.rows; b++) {
        long last = state_at(s, k, b, s.time - 1);
        memcpy(out.final_state + b * 2 * D + d, out.cells + last, k.channels * 4);
        memcpy(out.final_state + (b * 2 + 1) * D + d, out.output + last, k.channels * 4);
    }
    out.jacobian[index] = worst;
}

static void lstm_backward(Shape s, Task k, Inputs in, Adjoint adj) {
    const long D = s.heads * s.width, N = s.width, d = k.head * N + k.channel;
    const float *a = in.recurrent + d, *peep = in.peephole + d, *bias = in.bias + d;
    float *total = adj.d_parameters + k.group * 8 * D + d;
    Sums sums;
    memset(&sums, 0, sizeof sums);
    for (long b = 2 * k.row; b < 2 * (k.row + k.rows); b++)
        memcpy(adj.d_state + b * D + d, adj.grad_final + b * D + d, k.channels * 4);
    for (long t = s.time - 1; t >= 0; t--) {
        for (long b = k.row; b < k.row + k.rows; b++) {
            const float *x = in.gates + gate_at(s, k, b, t), *g = adj.grad + state_at(s, k, b, t);
            const float *initial = in.state + b * 2 * D + d;
            const float *q = previous(s, k, in, adj.cells, initial, b, t);
            const float *p = previous(s, k, in, adj.output, initial + D, b, t);
            const float pass = is_cut(s, in, b, t) ? 0.0f : 1.0f;
            float *restrict dx = adj.d_gates + gate_at(s, k, b, t);
            float *restrict vc = adj.d_state + b * 2 * D + d, *restrict vh = adj.d_state + (b * 2 + 1) * D + d;
#pragma omp simd
            for (long n = 0; n < k.channels; n++) {
                float a_f = a[n], a_o = a[D + n], a_z = a[2 * D + n];
                float f = sigmoid(x[n] + bias[n] + a_f * p[n] + peep[n] * q[n]);
                float z = hyperbolic(x[2 * N + n] + bias[2 * D + n] + a_z * p[n]);
                float c = z + f * (q[n] - z);
                float o = sigmoid(x[N + n] + bias[D + n] + a_o * p[n] + peep[D + n] * c);
                float th = hyperbolic(c), wh = g[n] + vh[n];
                float d_o = wh * th * o * (1 - o);
                float wc = vc[n] + wh * o * (1 - th * th) + d_o * peep[D + n];
                float d_f = wc * (q[n] - z) * f * (1 - f), d_z = wc * (1 - f) * (1 - z * z);
                dx[n] = d_f, dx[N + n] = d_o, dx[2 * N + n] = d_z;
                vh[n] = pass * (d_f * a_f + d_o * a_o + d_z * a_z);
                vc[n] = pass * (wc * f + d_f * peep[n]);
                sums.part[0][n] += d_f * p[n], sums.part[1][n] += d_o * p[n], sums.part[2][n] += d_z * p[n];
                sums.part[3][n] += d_f, sums.part[4][n] += d_o, sums.part[5][n] += d_z;
                sums.part[6][n] += d_f * q[n], sums.part[7][n] += d_o * c;
            }
        }
        if (t % BLOCK == 0) flush(&sums, 8, total, D, k.channels);
    }
}

/* One thread takes no parallel region: a forked process has none of its parent's threads. */
void newton_rnn_forward(const Shape *shape, const Inputs *in, const Outputs *out) {
    const Shape s = *shape;
    const long tasks = newton_rnn_tasks(shape);
    void (*run)(Shape, Task, Inputs, Outputs, long) = in->peephole ? lstm_forward : gru_forward;
    if (s.threads <= 1 || tasks == 1) {
        for (long i = 0; i < tasks; i++) run(s, task_of(s, i), *in, *out, i);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (long i = 0; i < tasks; i++) run(s, task_of(s, i), *in, *out, i);
}

void newton_rnn_backward(const Shape *shape, const Inputs *in, const Adjoint *adj) {
    const Shape s = *shape;
    const long tasks = newton_rnn_tasks(shape);
    void (*run)(Shape, Task, Inputs, Adjoint) = in->peephole ? lstm_backward : gru_backward;
    if (s.threads <= 1 || tasks == 1) {
        for (long i = 0; i < tasks; i++) run(s, task_of(s, i), *in, *adj);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (long i = 0; i < tasks; i++) run(s, task_of(s, i), *in, *adj);
}
