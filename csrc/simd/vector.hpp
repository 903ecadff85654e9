// The CPU's verbs, over the compiler's own vector type: one text for every instruction set.
//
// Vector<float> is as wide as the widest register the file is compiled for: 16 lanes with AVX-512, 8 with
// AVX2, 4 with SSE2 or NEON. Arithmetic, comparison and `mask ? a : b` are the compiler's; a * b + c becomes
// one fma.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/types.hpp"

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace lmkern {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

// The integers of the same width, for bits and masks.
template <class C>
struct IntegerOf;
template <>
struct IntegerOf<float> {
    using type = int32_t;
};
template <>
struct IntegerOf<double> {
    using type = int64_t;
};
template <class C>
using Integers = Vector<typename IntegerOf<C>::type>;

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

template <class C>
inline Vector<C> broadcast(C value) {
    return Vector<C>{} + value;
}

// The element at p in every lane. Straight from memory: a broadcast between registers takes a port from the
// products.
inline Vector<float> load_broadcast(const float* p) {
#if defined(__AVX512F__)
    return bit_cast<Vector<float>>(_mm512_broadcastss_ps(_mm_load_ss(p)));
#elif defined(__AVX2__)
    return bit_cast<Vector<float>>(_mm256_broadcast_ss(p));
#else
    return broadcast(*p);
#endif
}
inline Vector<double> load_broadcast(const double* p) {
#if defined(__AVX512F__)
    return bit_cast<Vector<double>>(_mm512_broadcastsd_pd(_mm_load_sd(p)));
#elif defined(__AVX2__)
    return bit_cast<Vector<double>>(_mm256_broadcast_sd(p));
#else
    return broadcast(*p);
#endif
}

// 0, 1, 2, ... in the lanes.
template <class C>
inline Integers<C> lane_indices() {
    Integers<C> indices;
    for (int lane = 0; lane < kLanes<C>; ++lane) indices[lane] = lane;
    return indices;
}

inline Vector<float> load(const float* p) {
    Vector<float> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Vector<double> load(const double* p) {
    Vector<double> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// 16 bytes from each of p, p + stride, ...; stride in elements. Put together in memory, they could not be
// loaded as a vector before they are in the cache.
template <class T>
inline Vector<uint32_t> load_lanes(const T* p, int64_t stride) {
#if defined(__AVX2__)
    auto at = [&](int lane) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + lane * stride)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
#if defined(__AVX512F__)
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
    return bit_cast<Vector<uint32_t>>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#else
    return bit_cast<Vector<uint32_t>>(low);
#endif
#else
    Vector<uint32_t> v;
    std::memcpy(&v, p, sizeof v);
    return v;
#endif
}

// 16-bit integers as 32-bit ones. GCC 12 takes twice the instructions for its own conversion.
inline Vector<uint32_t> widen(const HalfBits& bits) {
#if defined(__AVX512F__)
    return bit_cast<Vector<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
    return bit_cast<Vector<uint32_t>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
    return __builtin_convertvector(bits, Vector<uint32_t>);
#endif
}

// The lower halves of 32-bit integers whose upper halves are zero.
inline HalfBits narrow(Vector<uint32_t> bits) {
#if defined(__AVX512F__)
    return bit_cast<HalfBits>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(bits)));
#elif defined(__AVX2__)
    const __m256i all = bit_cast<__m256i>(bits);
    return bit_cast<HalfBits>(
        _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    return __builtin_convertvector(bits, HalfBits);
#endif
}

inline Vector<float> load(const bfloat16* p) {
    HalfBits bits;
    std::memcpy(&bits, p, sizeof bits);
    return bit_cast<Vector<float>>(widen(bits) << 16);
}

inline Vector<float> load(const float16* p) {
#if defined(__AVX512F__)
    return bit_cast<Vector<float>>(
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return bit_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    HalfBits bits;
    std::memcpy(&bits, p, sizeof bits);
    Vector<uint32_t> wide = widen(bits);
    Vector<uint32_t> sign = (wide & 0x8000u) << 16;
    const Vector<uint32_t> magnitude = (wide & 0x7fffu) << 13;
    // Rebias the exponent from 15 to 127; infinity and NaN go to the largest one.
    Vector<uint32_t> bits32 = magnitude + (112u << 23);
    bits32 = magnitude >= (0x7c00u << 13) ? magnitude + (224u << 23) : bits32;
    // A subnormal's mantissa under the exponent of 2^-14, less that 2^-14.
    const Vector<float> anchor = broadcast(0x1p-14f);
    const Vector<float> subnormal = bit_cast<Vector<float>>(magnitude + (113u << 23)) - anchor;
    bits32 = magnitude < (0x0400u << 13) ? bit_cast<Vector<uint32_t>>(subnormal) : bits32;
    return bit_cast<Vector<float>>(bits32 | sign);
#endif
}

inline void store(float* p, Vector<float> v) {
    std::memcpy(p, &v, sizeof v);
}
inline void store(double* p, Vector<double> v) {
    std::memcpy(p, &v, sizeof v);
}

// Rounded to bfloat16, in the upper halves: numbers alone, or NaN too.
inline Vector<uint32_t> number_to_upper(Vector<float> v) {
    const Vector<uint32_t> bits = bit_cast<Vector<uint32_t>>(v);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}
inline Vector<uint32_t> rounded_to_upper(Vector<float> v) {
    return v == v ? number_to_upper(v) : (bit_cast<Vector<uint32_t>>(v) | 0x400000u);
}

// Rounds to nearest, ties to even; a NaN stays one. The processor's own conversion takes float32's subnormals
// for zero, as all arithmetic in a kernel does (FlushDenormals in core/parallel_for.hpp).
inline void store(bfloat16* p, Vector<float> v) {
#if defined(__AVX512BF16__)
    const auto half = _mm512_maskz_cvtneps_pbh(0xffff, bit_cast<__m512>(v));
#else
    const HalfBits half = narrow(rounded_to_upper(v) >> 16);
#endif
    std::memcpy(p, &half, sizeof half);
}

inline void store(float16* p, Vector<float> v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    Vector<uint32_t> bits = bit_cast<Vector<uint32_t>>(v);
    Vector<uint32_t> sign = (bits >> 16) & 0x8000u;
    Vector<uint32_t> magnitude = bits & 0x7fffffffu;
    // Adding 2^(e + 13), e the value's exponent, lets the float32 adder round at float16's last place.
    const Vector<float> anchor = bit_cast<Vector<float>>((magnitude & 0x7f800000u) + (13u << 23));
    const Vector<float> rounded = (bit_cast<Vector<float>>(magnitude) + anchor) - anchor;
    Vector<uint32_t> half = (bit_cast<Vector<uint32_t>>(rounded) - (112u << 23)) >> 13;
    // Under 2^-14 the last place is 2^-24, that of 0.5 in float32.
    const Vector<float> lifted = bit_cast<Vector<float>>(magnitude) + 0.5f;
    half = magnitude < 0x38800000u ? bit_cast<Vector<uint32_t>>(lifted) - 0x3f000000u : half;
    half =
        magnitude >= 0x477ff000u ? 0x7c00u + Vector<uint32_t>{} : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? 0x7e00u + Vector<uint32_t>{} : half;  // NaN
    HalfBits packed = narrow(half | sign);
    std::memcpy(p, &packed, sizeof packed);
#endif
}

// Two vectors whose elements take turns in memory: 16-bit ones are read so in half of the instructions that
// vectors of neighbours take.
template <class C>
struct EvenOdd {
    Vector<C> even, odd;

    friend EvenOdd operator+(EvenOdd a, EvenOdd b) { return {a.even + b.even, a.odd + b.odd}; }
    friend EvenOdd operator-(EvenOdd a, EvenOdd b) { return {a.even - b.even, a.odd - b.odd}; }
    friend EvenOdd operator*(EvenOdd a, EvenOdd b) { return {a.even * b.even, a.odd * b.odd}; }
    friend EvenOdd operator+(EvenOdd a, C b) { return {a.even + b, a.odd + b}; }
    friend EvenOdd operator-(EvenOdd a, C b) { return {a.even - b, a.odd - b}; }
    friend EvenOdd operator*(EvenOdd a, C b) { return {a.even * b, a.odd * b}; }
    EvenOdd& operator+=(EvenOdd b) { return *this = *this + b; }
};

inline EvenOdd<float> load_pairs(const bfloat16* p) {
    Vector<uint32_t> bits;
    std::memcpy(&bits, p, sizeof bits);
    return {bit_cast<Vector<float>>(bits << 16), bit_cast<Vector<float>>(bits & 0xffff0000u)};
}

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX2__) && !defined(__AVX512F__)
// One look for a NaN in two vectors costs less than a choice in each.
inline bool either_has_nan(Vector<float> a, Vector<float> b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), _CMP_UNORD_Q)) != 0;
}
#endif

// As stored by store().
inline Halves narrow_pairs(EvenOdd<float> v) {
#if defined(__AVX512BF16__)
    constexpr int lanes = kLanes<float>;
    const auto apart =
        bit_cast<Halves>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(v.odd), bit_cast<__m512>(v.even)));
    Halves order;
    for (int lane = 0; lane < 2 * lanes; ++lane) order[lane] = lane / 2 + lane % 2 * lanes;
    return bit_cast<Halves>(_mm512_permutexvar_epi16(bit_cast<__m512i>(order), bit_cast<__m512i>(apart)));
#else
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (__builtin_expect(!either_has_nan(v.even, v.odd), 1))
        return bit_cast<Halves>(_mm256_blend_epi16(bit_cast<__m256i>(number_to_upper(v.even) >> 16),
                                                   bit_cast<__m256i>(number_to_upper(v.odd)), 0xaa));
#endif
    return bit_cast<Halves>((rounded_to_upper(v.even) >> 16) | (rounded_to_upper(v.odd) & 0xffff0000u));
#endif
}

// Two vectors of neighbours, one behind the other.
template <class T>
inline void store_two(T* p, Vector<Compute<T>> a, Vector<Compute<T>> b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bfloat16>)
        if (__builtin_expect(!either_has_nan(a, b), 1)) {
            // Packed within the halves of the registers: their quarters are then in the order 0, 2, 1, 3.
            const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(number_to_upper(a) >> 16),
                                                       bit_cast<__m256i>(number_to_upper(b) >> 16));
            return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
        }
#endif
    store(p, a);
    store(p + kLanes<Compute<T>>, b);
}

// The values that would be stored.
template <class T>
inline Vector<Compute<T>> rounded(Vector<Compute<T>> v) {
    T stored[kLanes<Compute<T>>];
    store(stored, v);
    return load(stored);
}

#if defined(__AVX2__)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif
// A vector past the caches: for what they would not hold until it is read. What else belongs to its cache
// line must follow at once. Where there is no such store it is an ordinary one. Other threads see it at the
// end of the loop over tasks.
inline void stream_vector(void* place, const void* vector) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(place), *static_cast<const __m512i*>(vector));
#elif defined(__AVX2__)
    _mm256_stream_si256(static_cast<__m256i*>(place), *static_cast<const __m256i*>(vector));
#else
    std::memcpy(place, vector, kVectorBytes);
#endif
}
// The same for a vector of elements, half of one if they have 16 bits.
template <class T>
inline void stream(T* p, Vector<Compute<T>> v) {
    if constexpr (sizeof(T) == sizeof(Compute<T>)) {
        stream_vector(p, &v);
    } else {
        T narrow[kLanes<Compute<T>>];
        store(narrow, v);
#if defined(__AVX512F__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(narrow)));
#elif defined(__AVX2__)
        _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow)));
#else
        std::memcpy(p, narrow, sizeof narrow);
#endif
    }
}
// Whether rows of so many bytes, one behind the other from `place` on, are whole lines that can be streamed.
inline bool streams_to(const void* place, int64_t row_bytes) {
    return kStreams && reinterpret_cast<uintptr_t>(place) % 64 == 0 && row_bytes % 64 == 0;
}

// The first n elements, at most 2 `most` - 1, in pieces of fixed sizes: a call of memcpy costs more.
template <int most, class T>
inline void copy_few(T* to, const T* from, int64_t n) {
    if constexpr (most > 0) {
        const int64_t piece = n & most;
        if (piece != 0) std::memcpy(to, from, most * sizeof(T));
        copy_few<most / 2>(to + piece, from + piece, n);
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits of the first n lanes, for loads and stores under a mask.
template <class C>
inline __m256i first_lanes_mask(int64_t n) {
    return bit_cast<__m256i>(lane_indices<C>() < static_cast<typename IntegerOf<C>::type>(n));
}
#endif

// The first n elements; the other lanes are zero. Memory past them is not touched.
template <class T>
inline Vector<Compute<T>> load(const T* p, int64_t n) {
    T buffer[kLanes<Compute<T>>] = {};
#if defined(__AVX512F__)
    const auto mask = (uint32_t{1} << n) - 1;
    if constexpr (sizeof(T) == 8)
        return bit_cast<Vector<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
    else if constexpr (sizeof(T) == 4)
        return bit_cast<Vector<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
    else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer),
                            _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
#else
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 8)
        return bit_cast<Vector<double>>(_mm256_maskload_pd(p, first_lanes_mask<double>(n)));
    else if constexpr (sizeof(T) == 4)
        return bit_cast<Vector<float>>(_mm256_maskload_ps(p, first_lanes_mask<float>(n)));
#endif
    copy_few<kLanes<Compute<T>>>(buffer, p, n);
#endif
    return load(buffer);
}

template <class T>
inline void store(T* p, Vector<Compute<T>> v, int64_t n) {
#if defined(__AVX512F__)
    const auto mask = (uint32_t{1} << n) - 1;
    if constexpr (sizeof(T) == 8) {
        return _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), bit_cast<__m512d>(v));
    } else if constexpr (sizeof(T) == 4) {
        return _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), bit_cast<__m512>(v));
    }
#endif
    T buffer[kLanes<Compute<T>>];
    store(buffer, v);
    copy_few<kLanes<Compute<T>>>(p, buffer, n);
}

// One element by the same rules as a vector of them.
template <class T>
inline Compute<T> load_one(const T* p) {
    return load(p, 1)[0];
}
template <class T>
inline void store_one(T* p, Compute<T> value) {
    store(p, broadcast(value), 1);
}
inline float load_one(const float* p) {
    return *p;
}
inline double load_one(const double* p) {
    return *p;
}
inline void store_one(float* p, float value) {
    *p = value;
}
inline void store_one(double* p, double value) {
    *p = value;
}

// A NaN in b wins, one in a does not: the running maximum is a, and sums carry the NaN on.
template <class V>
inline V max(V a, V b) {
    return a > b ? a : b;
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// GCC 12 compares and blends.
inline Vector<float> max(Vector<float> a, Vector<float> b) {
    return bit_cast<Vector<float>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
#endif

// The lanes `from` of a and, counted on, b.
template <int... from, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, from...);
#else
    return __builtin_shuffle(a, b, decltype(a == b){from...});
#endif
}

template <int distance, class V, int... lane>
inline V rotate(V v, std::integer_sequence<int, lane...>) {
    return shuffle<(lane + distance) % static_cast<int>(sizeof...(lane))...>(v, v);
}

template <class C, int half = kLanes<C> / 2>
inline C sum(Vector<C> v) {
    // Halves added together: the order is fixed, and errors grow with the logarithm of the lanes.
    if constexpr (half == 0)
        return v[0];
    else
        return sum<C, half / 2>(v + rotate<half>(v, std::make_integer_sequence<int, kLanes<C>>{}));
}

}  // namespace lmkern
