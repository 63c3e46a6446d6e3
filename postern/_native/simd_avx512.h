// Vectors of 512 bits (AVX-512 F, BW, DQ, VL). Included inside an unnamed namespace, after the target pragma.

struct Floats {
    using Scalar = float;
    static constexpr int width = 16;
    // 32 registers: two accumulators that take four vectors a block keep the pipes busy without spilling.
    static constexpr int accumulators = 2;
    static constexpr int vectors_per_accumulator = 4;
    __m512 v;

    static Floats set(float value) { return {_mm512_set1_ps(value)}; }

    static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Floats load(const BFloat16* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    }
    static Floats load(const Float16* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }

    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), as_bfloat16()); }
    void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), as_float16()); }

    void stream(float* p) const { _mm512_stream_ps(p, v); }
    void stream(BFloat16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), as_bfloat16()); }
    void stream(Float16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), as_float16()); }

    // The first elements, the others being `filling`.
    static Floats load(const float* p, std::size_t count, float filling) {
        return {_mm512_mask_loadu_ps(_mm512_set1_ps(filling), first(count), p)};
    }
    void store(float* p, std::size_t count) const { _mm512_mask_storeu_ps(p, first(count), v); }

    float sum() const { return _mm512_reduce_add_ps(v); }
    float maximum() const { return _mm512_reduce_max_ps(v); }

private:
    static __mmask16 first(std::size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
    __m256i as_float16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    __m256i as_bfloat16() const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
};

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats maximum(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
// a where the sign of x is set, else b.
inline Floats where_negative(Floats x, Floats a, Floats b) {
    return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), b.v, a.v)};
}
inline Floats scale(Floats a, Floats exponent) { return {_mm512_scalef_ps(a.v, exponent.v)}; }
// a * 2^exponent * factor with denormal results.
inline Floats scale_gradually(Floats a, Floats exponent, Floats factor) { return scale(a * factor, exponent); }

struct Doubles {
    using Scalar = double;
    static constexpr int width = 8;
    static constexpr int accumulators = 4;
    static constexpr int vectors_per_accumulator = 1;
    __m512d v;

    static Doubles set(double value) { return {_mm512_set1_pd(value)}; }
    static Doubles load(const double* p) { return {_mm512_loadu_pd(p)}; }
    void store(double* p) const { _mm512_storeu_pd(p, v); }
    void stream(double* p) const { _mm512_stream_pd(p, v); }
    double sum() const { return _mm512_reduce_add_pd(v); }
    double maximum() const { return _mm512_reduce_max_pd(v); }
};

inline Doubles operator+(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Doubles operator-(Doubles a, Doubles b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline Doubles maximum(Doubles a, Doubles b) { return {_mm512_max_pd(a.v, b.v)}; }
inline Doubles scale(Doubles a, Doubles exponent) { return {_mm512_scalef_pd(a.v, exponent.v)}; }
inline Doubles scale_gradually(Doubles a, Doubles exponent, Doubles factor) { return scale(a * factor, exponent); }
