// 3 x 3 convolutions of step 1 and padding 1, and their gradients, by Winograd's F(4 x 4, 3 x 3)
// (Lavin and Gray, arXiv 1509.09308): a quarter of the multiplications. For training on processors
// with AVX2: float32, channels last, one thread; channels are multiples of 16, heights and widths
// of 4. Errors are up to five times those of sums in order: 1e-6 of the norm, and up to 2e-5 in the
// gradients of weights, which are sums over all images.
#include <immintrin.h>

#include <cstdlib>
#include <cstring>

using Vector = __m256;

static const float zeros[4096] = {};
static inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
static inline Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
static inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
static inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vector all(float x) { return _mm256_set1_ps(x); }

// Tiles that are worked on together: what belongs to them stays in the second-level cache.
constexpr long T = 48;
// Floats between two positions of a tile, apart from powers of two, which would share cache lines.
constexpr long plane(long channels) { return T * channels + 16; }

// B^T d, of the article: six inputs to six.
static inline void transform_input(const Vector* d, Vector* o) {
  Vector m4 = all(-4.f), p4 = all(4.f), m5 = all(-5.f), p2 = all(2.f), m2 = all(-2.f);
  o[0] = fma(p4, d[0], fma(m5, d[2], d[4]));
  Vector a = fma(m4, d[2], d[4]), b = fma(m4, d[1], d[3]);
  o[1] = add(a, b);
  o[2] = sub(a, b);
  Vector c = sub(d[4], d[2]), e = sub(d[3], d[1]);
  o[3] = fma(p2, e, c);
  o[4] = fma(m2, e, c);
  o[5] = fma(p4, d[1], fma(m5, d[3], d[5]));
}

// A^T m: six products to four outputs.
static inline void transform_output(const Vector* m, Vector* o) {
  Vector s = add(m[1], m[2]), d = sub(m[1], m[2]), t = add(m[3], m[4]), e = sub(m[3], m[4]);
  o[0] = add(m[0], add(s, t));
  o[1] = fma(all(2), e, d);
  o[2] = fma(all(4), t, s);
  o[3] = add(fma(all(8), e, d), m[5]);
}

// A y, its transpose: four gradients to six.
static inline void transform_gradient(const Vector* y, Vector* o) {
  Vector s = add(y[0], y[2]), d = add(y[1], y[3]);
  Vector t = fma(all(4), y[2], y[0]), e = fma(all(8), y[3], mul(all(2), y[1]));
  o[0] = y[0];
  o[1] = add(s, d);
  o[2] = sub(s, d);
  o[3] = add(t, e);
  o[4] = sub(t, e);
  o[5] = y[3];
}

static const float G[6][3] = {{.25f, 0, 0},
                              {-1 / 6.f, -1 / 6.f, -1 / 6.f},
                              {-1 / 6.f, 1 / 6.f, -1 / 6.f},
                              {1 / 24.f, 1 / 12.f, 1 / 6.f},
                              {1 / 24.f, -1 / 12.f, 1 / 6.f},
                              {0, 0, 1}};

// G g G^T of weights at strides of outputs, channels, rows and columns: U[36][C][K].
static void weights(const float* w, long sk, long sc, long sr, long ss, int C, int K, float* U) {
  for (int c = 0; c < C; c++)
    for (int k = 0; k < K; k++) {
      float t[6][3];
      const float* g = w + k * sk + c * sc;
      for (int i = 0; i < 6; i++)
        for (int s = 0; s < 3; s++) {
          float a = 0;
          for (int r = 0; r < 3; r++) a += G[i][r] * g[r * sr + s * ss];
          t[i][s] = a;
        }
      for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++) {
          float a = 0;
          for (int s = 0; s < 3; s++) a += G[j][s] * t[i][s];
          U[((i * 6 + j) * C + c) * K + k] = a;
        }
    }
}

struct Tiles {
  int N, H, W, th, tw;
  long count;
};

// Where the outputs of a tile begin.
struct Place {
  long image;
  int y, x;
};

static Place place_of(const Tiles& g, long tile) {
  return {tile / ((long)g.tw * g.th), (int)(tile / g.tw % g.th) * 4, (int)(tile % g.tw) * 4};
}

// Zeros for the tiles from n on, which are missing from the last ones.
static void clear_rest(float* planes, int channels, long n) {
  for (int p = 0; p < 36; p++)
    std::memset(planes + p * plane(channels) + n * channels, 0, (T - n) * channels * sizeof(float));
}

// B^T d B of n tiles from t0 on; the rest are zeros: V[36][T][C].
static void input_tiles(const float* x, const Tiles& g, int C, long t0, int n, float* V) {
  clear_rest(V, C, n);
  for (int t = 0; t < n; t++) {
    Place at = place_of(g, t0 + t);
    int y0 = at.y - 1, x0 = at.x - 1;
    const float* base = x + at.image * g.H * g.W * C;
    const float* row[6];
    for (int i = 0; i < 6; i++) {
      int yy = y0 + i;
      row[i] = (yy < 0 || yy >= g.H) ? zeros : base + ((long)yy * g.W + x0) * C;
    }
    bool left = x0 < 0, right = x0 + 5 >= g.W;
    for (int c = 0; c < C; c += 8) {
      Vector q[6][6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; j++) {
        Vector d[6], o[6];
        if ((j == 0 && left) || (j == 5 && right)) {
          _Pragma("GCC unroll 6") for (int i = 0; i < 6; i++) q[i][j] = all(0);
          continue;
        }
        _Pragma("GCC unroll 6") for (int i = 0; i < 6; i++) d[i] =
            _mm256_loadu_ps(row[i] + (long)j * C + c);
        transform_input(d, o);
        _Pragma("GCC unroll 6") for (int i = 0; i < 6; i++) q[i][j] = o[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < 6; i++) {
        Vector o[6];
        transform_input(q[i], o);
        _Pragma("GCC unroll 6") for (int j = 0; j < 6; j++)
            _mm256_storeu_ps(V + (i * 6 + j) * plane(C) + t * (long)C + c, o[j]);
      }
    }
  }
}

// A^T M A of tiles, written to their places.
static void output_tiles(const float* M, const Tiles& g, int K, long t0, int n, float* y) {
  for (int t = 0; t < n; t++) {
    Place at = place_of(g, t0 + t);
    float* base = y + at.image * g.H * g.W * K;
    for (int k = 0; k < K; k += 8) {
      Vector q[4][6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; j++) {
        Vector m[6], o[4];
        _Pragma("GCC unroll 6") for (int i = 0; i < 6; i++) m[i] =
            _mm256_loadu_ps(M + (i * 6 + j) * plane(K) + t * (long)K + k);
        transform_output(m, o);
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) q[i][j] = o[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        Vector o[4];
        transform_output(q[i], o);
        float* to = base + ((long)(at.y + i) * g.W + at.x) * K + k;
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++)
            _mm256_storeu_ps(to + (long)j * K, o[j]);
      }
    }
  }
}

// A dY A^T of tiles: M[36][T][K].
static void gradient_tiles(const float* y, const Tiles& g, int K, long t0, int n, float* M) {
  clear_rest(M, K, n);
  for (int t = 0; t < n; t++) {
    Place at = place_of(g, t0 + t);
    const float* base = y + at.image * g.H * g.W * K;
    for (int k = 0; k < K; k += 8) {
      Vector d[4], q[6][4], o[6];
      for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++)
          d[i] = _mm256_loadu_ps(base + ((long)(at.y + i) * g.W + at.x + j) * K + k);
        transform_gradient(d, o);
        for (int i = 0; i < 6; i++) q[i][j] = o[i];
      }
      for (int i = 0; i < 6; i++) {
        transform_gradient(q[i], o);
        for (int j = 0; j < 6; j++)
          _mm256_storeu_ps(M + (i * 6 + j) * plane(K) + t * (long)K + k, o[j]);
      }
    }
  }
}

// M[T][K] = V[T][C] U[C][K]
static void multiply(const float* V, const float* U, int C, int K, float* M) {
  for (int k = 0; k < K; k += 16)
    for (int t = 0; t < T; t += 6) {
      Vector a[6][2];
      for (int i = 0; i < 6; i++) a[i][0] = a[i][1] = all(0);
      const float *u = U + k, *w = V + (long)t * C;
      for (int c = 0; c < C; c++, u += K) {
        Vector b0 = _mm256_loadu_ps(u), b1 = _mm256_loadu_ps(u + 8);
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
          Vector x = _mm256_broadcast_ss(w + (long)i * C + c);
          a[i][0] = fma(x, b0, a[i][0]);
          a[i][1] = fma(x, b1, a[i][1]);
        }
      }
      for (int i = 0; i < 6; i++) {
        _mm256_storeu_ps(M + (long)(t + i) * K + k, a[i][0]);
        _mm256_storeu_ps(M + (long)(t + i) * K + k + 8, a[i][1]);
      }
    }
}

// D[C][K] += V[T][C]^T M[T][K]
template <int R>
static void outer(const float* V, const float* M, int C, int K, int c, int k, float* D) {
  Vector a[R][2];
  for (int i = 0; i < R; i++) {
    a[i][0] = _mm256_loadu_ps(D + (long)(c + i) * K + k);
    a[i][1] = _mm256_loadu_ps(D + (long)(c + i) * K + k + 8);
  }
  for (int t = 0; t < T; t++) {
    Vector b0 = _mm256_loadu_ps(M + (long)t * K + k), b1 = _mm256_loadu_ps(M + (long)t * K + k + 8);
#pragma GCC unroll 6
    for (int i = 0; i < R; i++) {
      Vector x = _mm256_broadcast_ss(V + (long)t * C + c + i);
      a[i][0] = fma(x, b0, a[i][0]);
      a[i][1] = fma(x, b1, a[i][1]);
    }
  }
  for (int i = 0; i < R; i++) {
    _mm256_storeu_ps(D + (long)(c + i) * K + k, a[i][0]);
    _mm256_storeu_ps(D + (long)(c + i) * K + k + 8, a[i][1]);
  }
}

static void add_outer_products(const float* V, const float* M, int C, int K, float* D) {
  for (int k = 0; k < K; k += 16) {
    int c = 0;
    for (; c + 6 <= C; c += 6) outer<6>(V, M, C, K, c, k, D);
    for (; c + 4 <= C; c += 4) outer<4>(V, M, C, K, c, k, D);
    for (; c + 2 <= C; c += 2) outer<2>(V, M, C, K, c, k, D);
  }
}

static Tiles tiles_of(int N, int H, int W) {
  Tiles g = {N, H, W, H / 4, W / 4, 0};
  g.count = (long)N * g.th * g.tw;
  return g;
}

static float* allocated(long n) { return (float*)aligned_alloc(64, (n * 4 + 63) / 64 * 64); }

// y[N][H][W][K]
extern "C" void convolve(const float* x, const float* w, long sk, long sc, long sr, long ss, int N,
                         int H, int W, int C, int K, float* y) {
  Tiles g = tiles_of(N, H, W);
  float *U = allocated(36L * C * K), *V = allocated(36L * plane(C)), *M = allocated(36L * plane(K));
  weights(w, sk, sc, sr, ss, C, K, U);
  for (long t0 = 0; t0 < g.count; t0 += T) {
    int n = g.count - t0 < T ? g.count - t0 : T;
    input_tiles(x, g, C, t0, n, V);
    for (int p = 0; p < 36; p++)
      multiply(V + p * plane(C), U + (long)p * C * K, C, K, M + p * plane(K));
    output_tiles(M, g, K, t0, n, y);
  }
  free(U);
  free(V);
  free(M);
}

// dw[K][3][3][C]
extern "C" void weight_gradient(const float* x, const float* dy, int N, int H, int W, int C, int K,
                                float* dw) {
  Tiles g = tiles_of(N, H, W);
  float *D = allocated(36L * C * K), *V = allocated(36L * plane(C)), *M = allocated(36L * plane(K));
  std::memset(D, 0, 36L * C * K * 4);
  for (long t0 = 0; t0 < g.count; t0 += T) {
    int n = g.count - t0 < T ? g.count - t0 : T;
    input_tiles(x, g, C, t0, n, V);
    gradient_tiles(dy, g, K, t0, n, M);
    for (int p = 0; p < 36; p++)
      add_outer_products(V + p * plane(C), M + p * plane(K), C, K, D + (long)p * C * K);
  }
  for (int c = 0; c < C; c++)
    for (int k = 0; k < K; k++) {
      float t[3][6];
      for (int r = 0; r < 3; r++)
        for (int j = 0; j < 6; j++) {
          float a = 0;
          for (int i = 0; i < 6; i++) a += G[i][r] * D[((i * 6 + j) * (long)C + c) * K + k];
          t[r][j] = a;
        }
      for (int r = 0; r < 3; r++)
        for (int s = 0; s < 3; s++) {
          float a = 0;
          for (int j = 0; j < 6; j++) a += G[j][s] * t[r][j];
          dw[((long)(k * 3 + r) * 3 + s) * C + c] = a;
        }
    }
  free(D);
  free(V);
  free(M);
}
