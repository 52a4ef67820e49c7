/* The passes over memory that a step makes for each activation: flags, rows of 4 or 8 bits, and the way back.

   One pass each, in blocks that stay in the cache, written so that a compiler turns the inner loops into vector
   instructions. lightning_lance/tensors/native.py says what goes in and comes out; without this module torch's kernels
   and NumPy's do the same in several passes. */

#include <Python.h> /* the limited interface, where setup.py says so */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _MSC_VER
#define restrict __restrict
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx2,fma,f16c")))
#endif

/* Into their callers, which say what instructions there are. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

enum { SINGLE = 0, BRAIN = 1 }; /* float32, bfloat16 */
enum { SHORTEST = 16, LONGEST = 256, BLOCK = 64, LANES = 16 };

static const uint64_t GATHER = UINT64_C(0x8040201008040201);

/* How a tensor (B, C, ...) changes by channel: x * factor[c] + term[c], c = (place / inner) % channels. */
typedef struct {
    const float *factor, *term; /* NULL: not at all */
    int64_t channels, inner;
} Affine;

/* Windows on two axes. */
typedef struct {
    int64_t size[2], out[2], kernel[2], stride[2], padding[2];
} Window;

typedef struct {
    const void *input;
    void *out;
    int64_t count; /* elements */
    int dtype, group, bits, cuts, itemsize;
    float scale, low, high;
    Affine affine;
    const char *table;
    const void *gradient;
    double *sums; /* of each thread: 2 * channels */
    const float *first, *second, *third; /* of each channel */
    const int64_t *start, *distance;
    const uint8_t *codes;
    int64_t outs, ins;
    Window window;
    uint8_t *places;
} Work;

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* To the nearest float16, ties to even. */
INLINE uint16_t to_half(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    if (size >= 0x47800000) /* beyond, infinite or NaN */
        return (uint16_t)(sign | (size > 0x7F800000 ? 0x7E00 : 0x7C00));
    if (size < 0x38800000) /* subnormal: the sum leaves its last place where that of a half is */
        return (uint16_t)(sign | (to_bits(from_bits(size) + 0.5f) - 0x3F000000));
    return (uint16_t)(sign | ((size + 0xC8000FFF + (size >> 13 & 1)) >> 13));
}

INLINE float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7FFF;
    if (size >= 0x7C00)
        return from_bits(sign | 0x7F800000 | (size & 0x3FF) << 13);
    if (size < 0x400)
        return from_bits(sign | to_bits((float)size * 0x1p-24f));
    return from_bits(sign | ((size << 13) + 0x38000000));
}

INLINE uint16_t to_brain(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7FC0 : rounded);
}

/* Flags --------------------------------------------------------------------------------------------------------- */

INLINE void flags_of_singles(
    const float *restrict x, int64_t count, float low, float high, uint8_t *restrict out) {
    uint8_t flags[BLOCK];
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t left = count - start;
        if (left >= BLOCK) {
            for (int k = 0; k < BLOCK; k++)
                flags[k] = (uint8_t)(!(x[start + k] <= low) & !(x[start + k] >= high));
        } else {
            memset(flags, 0, sizeof flags);
            for (int k = 0; k < left; k++)
                flags[k] = (uint8_t)(!(x[start + k] <= low) & !(x[start + k] >= high));
        }
        for (int k = 0; k < BLOCK && k < left; k += 8) {
            uint64_t word;
            memcpy(&word, flags + k, sizeof word);
            out[(start + k) / 8] = (uint8_t)(word * GATHER >> 56);
        }
    }
}

INLINE void flags_of_brains(
    const uint16_t *restrict x, int64_t count, float low, float high, uint8_t *restrict out) {
    float block[BLOCK];
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t left = count - start < BLOCK ? count - start : BLOCK;
        for (int k = 0; k < left; k++)
            block[k] = from_bits((uint32_t)x[start + k] << 16);
        flags_of_singles(block, left, low, high, out + start / 8);
    }
}

/* One entry of a table of 256 for every eight flags. */
INLINE void values_of_flags(const uint8_t *flags, int64_t count, const char *table, int itemsize, char *out) {
    const int size = 8 * itemsize;
    for (int64_t i = 0; i < count / 8; i++)
        memcpy(out + i * size, table + flags[i] * size, (size_t)size);
    if (count % 8)
        memcpy(out + count / 8 * size, table + flags[count / 8] * size, (size_t)(count % 8 * itemsize));
}

static uint32_t expand_flags(const Work *work, int64_t first, int64_t last, int thread) {
    const int64_t start = first * BLOCK, end = last * BLOCK < work->count ? last * BLOCK : work->count;
    const uint8_t *flags = (const uint8_t *)work->input + start / 8;
    char *out = (char *)work->out + start * work->itemsize;
    if (work->itemsize == 4) /* a constant size is copied by one instruction */
        values_of_flags(flags, end - start, work->table, 4, out);
    else if (work->itemsize == 2)
        values_of_flags(flags, end - start, work->table, 2, out);
    else
        values_of_flags(flags, end - start, work->table, work->itemsize, out);
    return 0;
}

/* Rows ---------------------------------------------------------------------------------------------------------- */

/* In 32 bits where it fits, which is several times as fast. */
INLINE int64_t quotient(int64_t place, int64_t size) {
    return place >> 31 || size >> 31 ? place / size : (int64_t)((uint32_t)place / (uint32_t)size);
}

INLINE int64_t channel_of(int64_t place, const Affine *affine, int64_t *within) {
    const int64_t map = affine->inner == 1 ? place : quotient(place, affine->inner);
    *within = place - map * affine->inner;
    return map - quotient(map, affine->channels) * affine->channels;
}

INLINE void change(float *restrict x, int count, int64_t channel, int64_t within, const Affine *affine) {
    for (int done = 0; done < count;) {
        const int last = affine->inner == 1; /* channels lie innermost */
        const int64_t left = last ? affine->channels - channel : affine->inner - within;
        const int end = left < count - done ? done + (int)left : count;
        const float *restrict factor = affine->factor + channel, *restrict term = affine->term + channel;
        if (last) {
            for (int k = done; k < end; k++)
                x[k] = x[k] * factor[k - done] + term[k - done];
            channel = 0;
        } else {
            const float one_factor = *factor, one_term = *term;
            for (int k = done; k < end; k++)
                x[k] = x[k] * one_factor + one_term;
            within = 0;
            channel = channel + 1 == affine->channels ? 0 : channel + 1;
        }
        done = end;
    }
}

INLINE void load(
    const void *input, int dtype, int64_t place, int count, float scale, const Affine *affine, float *restrict x) {
    if (dtype == BRAIN) {
        const uint16_t *from = (const uint16_t *)input + place;
        for (int k = 0; k < count; k++)
            x[k] = from_bits((uint32_t)from[k] << 16);
    } else
        memcpy(x, (const float *)input + place, (size_t)count * sizeof *x);
    if (scale != 1.0f)
        for (int k = 0; k < count; k++)
            x[k] *= scale;
    if (affine->factor) {
        int64_t within;
        const int64_t channel = channel_of(place, affine, &within);
        change(x, count, channel, within, affine);
    }
}

INLINE void ends(const float *restrict x, int count, float *least, float *most) {
    float low = x[0], high = x[0];
    for (int k = 1; k < count; k++) {
        low = x[k] < low ? x[k] : low;
        high = x[k] > high ? x[k] : high;
    }
    *least = low;
    *most = high;
}

/* To the nearest level, ties to even: the sum has no place behind the point. */
INLINE int32_t level_of(float x, float low, float inverse, int32_t levels) {
    int32_t level = (int32_t)to_bits((x - low) * inverse + 0x1.8p23f) - 0x4B400000;
    level = level > 0 ? level : 0;
    return level < levels ? level : levels;
}

INLINE void codes_of(const float *restrict x, int count, float low, float inverse, int bits, uint8_t *restrict out) {
    if (bits == 8)
        for (int k = 0; k < count; k++)
            out[k] = (uint8_t)level_of(x[k], low, inverse, 255);
    else
        for (int k = 0; k < count; k += 2)
            out[k / 2] = (uint8_t)(level_of(x[k], low, inverse, 15) | level_of(x[k + 1], low, inverse, 15) << 4);
}

INLINE void values_of(const uint8_t *restrict codes, int count, float step, float low, int bits, float *restrict out) {
    if (bits == 8)
        for (int k = 0; k < count; k++)
            out[k] = (float)codes[k] * step + low;
    else
        for (int k = 0; k < count / 2; k++) {
            out[2 * k] = (float)(codes[k] & 15) * step + low;
            out[2 * k + 1] = (float)(codes[k] >> 4) * step + low;
        }
}

#ifdef WIDE

/* The same, sixteen elements at a time; the last ones are done twice where they are fewer. */
#define EACH_SIXTEEN(k, count) \
    for (int next = 0, k = 0; next < (count); next += 16, k = next + 16 <= (count) ? next : (count) - 16)

WIDE static inline void ends_wide(const float *x, int count, float *least, float *most) {
    __m256 low = _mm256_loadu_ps(x), high = low, low2 = _mm256_loadu_ps(x + 8), high2 = low2;
    float lows[8], highs[8], highest_low;
    EACH_SIXTEEN(k, count) {
        const __m256 first = _mm256_loadu_ps(x + k), second = _mm256_loadu_ps(x + k + 8);
        low = _mm256_min_ps(low, first);
        high = _mm256_max_ps(high, first);
        low2 = _mm256_min_ps(low2, second);
        high2 = _mm256_max_ps(high2, second);
    }
    _mm256_storeu_ps(lows, _mm256_min_ps(low, low2));
    _mm256_storeu_ps(highs, _mm256_max_ps(high, high2));
    ends(lows, 8, least, most);
    ends(highs, 8, &highest_low, most);
}

WIDE static inline void codes_wide(const float *x, int count, float low, float inverse, int bits, uint8_t *out) {
    const __m256 lows = _mm256_set1_ps(low), inverses = _mm256_set1_ps(inverse);
    const __m256i levels = _mm256_set1_epi16(bits == 8 ? 255 : 15);
    EACH_SIXTEEN(k, count) {
        const __m256 first = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + k), lows), inverses);
        const __m256 second = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + k + 8), lows), inverses);
        const __m256i mixed = _mm256_packus_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second));
        const __m256i words = _mm256_min_epu16(_mm256_permute4x64_epi64(mixed, 0xD8), levels);
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        if (bits == 8)
            _mm_storeu_si128((__m128i *)(out + k), bytes);
        else {
            const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));
            _mm_storel_epi64((__m128i *)(out + k / 2), _mm_packus_epi16(pairs, pairs));
        }
    }
}

WIDE static inline void values_wide(const uint8_t *codes, int count, float step, float low, int bits, float *out) {
    const __m256 steps = _mm256_set1_ps(step), lows = _mm256_set1_ps(low);
    const __m128i fifteen = _mm_set1_epi8(15);
    EACH_SIXTEEN(k, count) {
        __m128i bytes;
        if (bits == 8)
            bytes = _mm_loadu_si128((const __m128i *)(codes + k));
        else {
            const __m128i pairs = _mm_loadl_epi64((const __m128i *)(codes + k / 2));
            bytes = _mm_unpacklo_epi8(
                _mm_and_si128(pairs, fifteen), _mm_and_si128(_mm_srli_epi16(pairs, 4), fifteen));
        }
        const __m256 first = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        const __m256 second = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
        _mm256_storeu_ps(out + k, _mm256_fmadd_ps(first, steps, lows));
        _mm256_storeu_ps(out + k + 8, _mm256_fmadd_ps(second, steps, lows));
    }
}

#else

#define ends_wide ends
#define codes_wide codes_of
#define values_wide values_of

#endif

INLINE void cut(float *x, int count, float low, float high) {
    for (int k = 0; k < count; k++) {
        const float value = x[k] < low ? low : x[k];
        x[k] = value > high ? high : value;
    }
}

INLINE void store_brains(const float *restrict x, int count, uint16_t *restrict out) {
    for (int k = 0; k < count; k++)
        out[k] = to_brain(x[k]);
}

INLINE int row_size(const Work *work) { return work->group * work->bits / 8 + (work->bits == 8 ? 8 : 4); }

/* Rows first to last, as torch's embedding_bag_4bit_prepack and embedding_bag_byte_prepack write them. Returns the
   largest number of a range: the bits of a float16 with 4 bits, of a float32, the step alone, with 8. */
INLINE uint32_t pack_rows(const Work *work, int64_t first, int64_t last, int thread, int wide) {
    const int group = work->group, bits = work->bits, size = row_size(work);
    uint8_t *row = (uint8_t *)work->out + first * size;
    uint32_t largest = 0;
    float block[LONGEST];
    for (int64_t r = first; r < last; r++, row += size) {
        const int64_t place = r * group, left = work->count - place;
        const int count = left < group ? (int)left : group;
        const float *x = block;
        float low, high, inverse;
        if (work->dtype == SINGLE && work->scale == 1.0f && !work->affine.factor && count == group)
            x = (const float *)work->input + place;
        else {
            load(work->input, work->dtype, place, count, work->scale, &work->affine, block);
            for (int k = count; k < group; k++)
                block[k] = block[count - 1];
        }
        wide ? ends_wide(x, group, &low, &high) : ends(x, group, &low, &high);
        if (bits == 8) {
            const float step = (high - low) / 255.0f;
            const uint32_t step_bits = to_bits(step) & 0x7FFFFFFF;
            inverse = 255.0f / (high - low + 1e-8f);
            memcpy(row + group, &step, sizeof step);
            memcpy(row + group + 4, &low, sizeof low);
            largest = step_bits > largest ? step_bits : largest;
        } else {
            const uint16_t low_half = to_half(low);
            const float spread = high - from_half(low_half);
            uint16_t step_half = to_half(spread / 15.0f);
            if (from_half(step_half) == 0.0f)
                step_half = 0x3C00; /* 1: of a group without a spread */
            else
                largest = (step_half & 0x7FFFu) > largest ? step_half & 0x7FFFu : largest;
            largest = (low_half & 0x7FFFu) > largest ? low_half & 0x7FFFu : largest;
            low = from_half(low_half);
            inverse = 1.0f / from_half(step_half);
            memcpy(row + group / 2, &step_half, sizeof step_half);
            memcpy(row + group / 2 + 2, &low_half, sizeof low_half);
        }
        wide ? codes_wide(x, group, low, inverse, bits, row) : codes_of(x, group, low, inverse, bits, row);
    }
    return largest;
}

/* The values of row r, changed by channel; `row` is where its codes lie. */
INLINE void values_of_row(const Work *work, const uint8_t *row, int64_t r, float *restrict x, int wide) {
    const int group = work->group, bits = work->bits;
    const Affine *affine = &work->affine;
    const int64_t place = r * group, left = work->count - place;
    int64_t within, channel;
    int changes = affine->factor != NULL;
    float step, low;
    if (bits == 8) {
        memcpy(&step, row + group, sizeof step);
        memcpy(&low, row + group + 4, sizeof low);
    } else {
        uint16_t range[2];
        memcpy(range, row + group / 2, sizeof range);
        step = from_half(range[0]);
        low = from_half(range[1]);
    }
    step *= work->scale;
    low *= work->scale;
    if (changes) {
        channel = channel_of(place, affine, &within);
        if (affine->inner > 1 && within + group <= affine->inner) { /* all of one channel */
            step *= affine->factor[channel];
            low = low * affine->factor[channel] + affine->term[channel];
            changes = 0;
        }
    }
    wide ? values_wide(row, group, step, low, bits, x) : values_of(row, group, step, low, bits, x);
    if (changes)
        change(x, left < group ? (int)left : group, channel, within, affine);
}

INLINE uint32_t expand_rows(const Work *work, int64_t first, int64_t last, int thread, int wide) {
    const int group = work->group, size = row_size(work);
    const uint8_t *row = (const uint8_t *)work->input + first * size;
    float block[LONGEST];
    for (int64_t r = first; r < last; r++, row += size) {
        const int64_t place = r * group, left = work->count - place;
        const int count = left < group ? (int)left : group;
        float *x = work->dtype == SINGLE && count == group ? (float *)work->out + place : block;
        values_of_row(work, row, r, x, wide);
        if (work->cuts)
            cut(x, count, work->low, work->high);
        if (work->dtype == BRAIN)
            store_brains(x, count, (uint16_t *)work->out + place);
        else if (x == block)
            memcpy((float *)work->out + place, block, (size_t)count * sizeof *block);
    }
    return 0;
}

/* What each of the sixteen codes of a row stands for. */
static uint32_t list_levels(const Work *work, int64_t first, int64_t last, int thread) {
    const int group = work->group, size = row_size(work);
    for (int64_t r = first; r < last; r++) {
        uint16_t range[2];
        float *out = (float *)work->out + r * 16;
        memcpy(range, (const uint8_t *)work->input + r * size + group / 2, sizeof range);
        const float step = from_half(range[0]) * work->scale, low = from_half(range[1]) * work->scale;
        for (int k = 0; k < 16; k++)
            out[k] = (float)k * step + low;
    }
    return 0;
}

INLINE void entries_of(const uint8_t *restrict codes, int count, const float *restrict table, float *restrict out) {
    for (int k = 0; k < count / 2; k++) {
        out[2 * k] = table[codes[k] & 15];
        out[2 * k + 1] = table[codes[k] >> 4];
    }
}

#ifdef WIDE
WIDE static inline __m256 entries(__m256i codes, __m256 low, __m256 high) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)); /* the fourth bit is the sign there */
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), upper);
}

WIDE static inline void entries_wide(const uint8_t *codes, int count, const float *table, float *out) {
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    const __m128i fifteen = _mm_set1_epi8(15);
    EACH_SIXTEEN(k, count) {
        const __m128i pairs = _mm_loadl_epi64((const __m128i *)(codes + k / 2));
        const __m128i bytes = _mm_unpacklo_epi8(
            _mm_and_si128(pairs, fifteen), _mm_and_si128(_mm_srli_epi16(pairs, 4), fifteen));
        _mm256_storeu_ps(out + k, entries(_mm256_cvtepu8_epi32(bytes), low, high));
        _mm256_storeu_ps(out + k + 8, entries(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), low, high));
    }
}
#else
#define entries_wide entries_of
#endif

INLINE const float *gradients(const Work *work, int64_t place, int count, float *restrict block) {
    if (work->dtype == SINGLE)
        return (const float *)work->gradient + place;
    const uint16_t *from = (const uint16_t *)work->gradient + place;
    for (int k = 0; k < count; k++)
        block[k] = from_bits((uint32_t)from[k] << 16);
    return block;
}

/* The entry of each code in the table of its row, times a gradient where there is one. */
INLINE uint32_t look_up(const Work *work, int64_t first, int64_t last, int thread, int wide) {
    const int group = work->group, size = row_size(work);
    float block[LONGEST], found[LONGEST];
    for (int64_t r = first; r < last; r++) {
        const int64_t place = r * group, left = work->count - place;
        const int count = left < group ? (int)left : group;
        const uint8_t *row = (const uint8_t *)work->input + r * size;
        const float *table = work->first + r * 16;
        float *out = work->dtype == SINGLE && count == group ? (float *)work->out + place : found;
        wide ? entries_wide(row, group, table, out) : entries_of(row, group, table, out);
        if (work->gradient) {
            const float *restrict g = gradients(work, place, count, block);
            for (int k = 0; k < count; k++)
                out[k] *= g[k];
        }
        if (work->dtype == BRAIN)
            store_brains(found, count, (uint16_t *)work->out + place);
        else if (out == found)
            memcpy((float *)work->out + place, found, (size_t)count * sizeof *found);
    }
    return 0;
}

/* The backward pass of a normalisation of channels, whose normalised input lies in rows ------------------------- */

INLINE void sums_of(const float *restrict g, const float *restrict x, int count, double *sum, double *product) {
    float sums[LANES] = {0}, products[LANES] = {0};
    int k = 0;
    for (; k + LANES <= count; k += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            sums[lane] += g[k + lane];
            products[lane] += g[k + lane] * x[k + lane];
        }
    for (int lane = 0; k < count; k++, lane++) {
        sums[lane] += g[k];
        products[lane] += g[k] * x[k];
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) {
            sums[lane] += sums[lane + half];
            products[lane] += products[lane + half];
        }
    *sum += sums[0];
    *product += products[0];
}

#ifdef WIDE
WIDE static inline void sums_wide(const float *g, const float *x, int count, double *sum, double *product) {
    __m256 sums = _mm256_setzero_ps(), sums2 = sums, products = sums, products2 = sums;
    float lanes[16];
    double rest = 0, rest_product = 0;
    int k = 0;
    for (; k + 16 <= count; k += 16) {
        const __m256 first = _mm256_loadu_ps(g + k), second = _mm256_loadu_ps(g + k + 8);
        sums = _mm256_add_ps(sums, first);
        sums2 = _mm256_add_ps(sums2, second);
        products = _mm256_fmadd_ps(first, _mm256_loadu_ps(x + k), products);
        products2 = _mm256_fmadd_ps(second, _mm256_loadu_ps(x + k + 8), products2);
    }
    _mm256_storeu_ps(lanes, _mm256_add_ps(sums, sums2));
    _mm256_storeu_ps(lanes + 8, _mm256_add_ps(products, products2));
    for (; k < count; k++) {
        rest += g[k];
        rest_product += g[k] * x[k];
    }
    for (int lane = 0; lane < 8; lane++) {
        rest += lanes[lane];
        rest_product += lanes[lane + 8];
    }
    *sum += rest;
    *product += rest_product;
}

#else
#define sums_wide sums_of
#endif

/* Of each channel the sum of the gradients, and of their products with the input. */
INLINE uint32_t sum_rows(const Work *work, int64_t first, int64_t last, int thread, int wide) {
    const int group = work->group, size = row_size(work);
    const Affine *affine = &work->affine;
    const int64_t channels = affine->channels, inner = affine->inner;
    const uint8_t *row = (const uint8_t *)work->input + first * size;
    double *sums = work->sums + 2 * channels * thread, *products = sums + channels;
    float x[LONGEST], block[LONGEST];
    for (int64_t r = first; r < last; r++, row += size) {
        const int64_t place = r * group, left = work->count - place;
        const int count = left < group ? (int)left : group;
        const float *g = gradients(work, place, count, block);
        int64_t within, channel = channel_of(place, affine, &within);
        values_of_row(work, row, r, x, wide);
        for (int done = 0; done < count;) {
            const int64_t rest = inner == 1 ? channels - channel : inner - within;
            const int end = rest < count - done ? done + (int)rest : count;
            if (inner == 1) {
                double *restrict sum = sums + channel, *restrict product = products + channel;
                for (int k = done; k < end; k++) {
                    sum[k - done] += g[k];
                    product[k - done] += g[k] * x[k];
                }
                channel = 0;
            } else {
                wide ? sums_wide(g + done, x + done, end - done, sums + channel, products + channel)
                     : sums_of(g + done, x + done, end - done, sums + channel, products + channel);
                within = 0;
                channel = channel + 1 == channels ? 0 : channel + 1;
            }
            done = end;
        }
    }
    return 0;
}

/* first[c] * gradient + second[c] * input + third[c]; without `second` the first product alone. */
INLINE uint32_t combine_rows(const Work *work, int64_t first, int64_t last, int thread, int wide) {
    const int group = work->group, size = row_size(work);
    const Affine *affine = &work->affine;
    const int64_t channels = affine->channels, inner = affine->inner;
    const uint8_t *row = (const uint8_t *)work->input + first * size;
    float x[LONGEST], block[LONGEST], results[LONGEST];
    memset(x, 0, sizeof x);
    for (int64_t r = first; r < last; r++, row += size) {
        const int64_t place = r * group, left = work->count - place;
        const int count = left < group ? (int)left : group;
        const float *g = gradients(work, place, count, block);
        float *restrict out = work->dtype == SINGLE ? (float *)work->out + place : results;
        int64_t within, channel = channel_of(place, affine, &within);
        if (work->cuts)
            values_of_row(work, row, r, x, wide);
        for (int done = 0; done < count;) {
            const int64_t rest = inner == 1 ? channels - channel : inner - within;
            const int end = rest < count - done ? done + (int)rest : count;
            const float *restrict a = work->first + channel, *restrict b = work->second + channel;
            const float *restrict c = work->third + channel;
            if (inner == 1) {
                for (int k = done; k < end; k++)
                    out[k] = a[k - done] * g[k] + (b[k - done] * x[k] + c[k - done]);
                channel = 0;
            } else {
                const float one_a = *a, one_b = *b, one_c = *c;
                for (int k = done; k < end; k++)
                    out[k] = one_a * g[k] + (one_b * x[k] + one_c);
                within = 0;
                channel = channel + 1 == channels ? 0 : channel + 1;
            }
            done = end;
        }
        if (work->dtype == BRAIN)
            store_brains(results, count, (uint16_t *)work->out + place);
    }
    return 0;
}

/* A gradient where a flag is set, zero elsewhere. ---------------------------------------------------------------- */

#define GATE(name, word)                                                                                               \
    INLINE void name(const uint8_t *restrict flags, const word *restrict g, int64_t count, word *restrict out) {       \
        int64_t i = 0;                                                                                                 \
        for (; i + 8 <= count; i += 8)                                                                                 \
            for (int k = 0; k < 8; k++)                                                                                \
                out[i + k] = g[i + k] & (word)-(word)(flags[i / 8] >> (7 - k) & 1);                                    \
        for (; i < count; i++)                                                                                         \
            out[i] = g[i] & (word)-(word)(flags[i / 8] >> (7 - i % 8) & 1);                                            \
    }
GATE(gate_words, uint32_t)
GATE(gate_halves, uint16_t)

#ifdef WIDE
WIDE static inline void gate_words_wide(const uint8_t *flags, const uint32_t *g, int64_t count, uint32_t *out) {
    const __m256i places = _mm256_setr_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(flags[i / 8]), places);
        const __m256i mask = _mm256_cmpeq_epi32(set, places);
        _mm256_storeu_si256(
            (__m256i *)(out + i), _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(g + i)), mask));
    }
    if (count > whole)
        gate_words(flags + whole / 8, g + whole, count - whole, out + whole);
}

WIDE static inline void gate_halves_wide(const uint8_t *flags, const uint16_t *g, int64_t count, uint16_t *out) {
    const __m256i places = _mm256_setr_epi16(128, 64, 32, 16, 8, 4, 2, 1, 1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11,
                                             1 << 10, 1 << 9, 1 << 8);
    const int64_t whole = count / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) {
        const __m256i both = _mm256_set1_epi16((int16_t)(flags[i / 8] | flags[i / 8 + 1] << 8));
        const __m256i mask = _mm256_cmpeq_epi16(_mm256_and_si256(both, places), places);
        _mm256_storeu_si256(
            (__m256i *)(out + i), _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(g + i)), mask));
    }
    if (count > whole)
        gate_halves(flags + whole / 8, g + whole, count - whole, out + whole);
}
#else
#define gate_words_wide gate_words
#define gate_halves_wide gate_halves
#endif

INLINE uint32_t gate(const Work *work, int64_t first, int64_t last, int thread, int wide) {
    const int64_t start = first * BLOCK, end = last * BLOCK < work->count ? last * BLOCK : work->count;
    const uint8_t *flags = (const uint8_t *)work->input + start / 8;
    if (work->itemsize == 2) {
        const uint16_t *g = (const uint16_t *)work->gradient + start;
        uint16_t *out = (uint16_t *)work->out + start;
        wide ? gate_halves_wide(flags, g, end - start, out) : gate_halves(flags, g, end - start, out);
        return 0;
    }
    const uint32_t *g = (const uint32_t *)work->gradient + start;
    uint32_t *out = (uint32_t *)work->out + start;
    wide ? gate_words_wide(flags, g, end - start, out) : gate_words(flags, g, end - start, out);
    return 0;
}

INLINE uint32_t pack_flags(const Work *work, int64_t first, int64_t last, int thread, int wide) {
    const int64_t start = first * BLOCK, end = last * BLOCK < work->count ? last * BLOCK : work->count;
    uint8_t *out = (uint8_t *)work->out + start / 8;
    if (work->dtype == BRAIN)
        flags_of_brains((const uint16_t *)work->input + start, end - start, work->low, work->high, out);
    else
        flags_of_singles((const float *)work->input + start, end - start, work->low, work->high, out);
    return 0;
}

/* Places of maxima in their windows ------------------------------------------------------------------------------ */

/* Of each maximum the place in its window, work->bits each, the first one lowest in its byte; from its index in a map,
   of which the window begins at start[], and the place at each of work->ins distances from there. */
static uint32_t pack_places(const Work *work, int64_t first, int64_t last, int thread) {
    const int64_t *index = (const int64_t *)work->input, *start = work->start, outs = work->outs;
    const uint8_t *codes = work->codes;
    const int bits = work->bits, each = 8 / bits;
    const int64_t begin = first * BLOCK, end = last * BLOCK < work->count ? last * BLOCK : work->count;
    uint8_t *out = (uint8_t *)work->out + begin / each;
    int64_t o = begin % outs;
    for (int64_t i = begin; i < end; out++) {
        int byte = 0;
        for (int k = 0; k < each && i < end; k++, i++) {
            const uint64_t distance = (uint64_t)(index[i] - start[o]);
            byte |= (distance < (uint64_t)work->ins ? codes[distance] : 0) << (k * bits);
            o = o + 1 == outs ? 0 : o + 1;
        }
        *out = (uint8_t)byte;
    }
    return 0;
}

/* Gradients of the maxima of maps first to last, added up where these were. */
INLINE void scatter_maps(const Work *work, int64_t first, int64_t last, int bits) {
    const int64_t outs = work->outs, ins = work->ins, *start = work->start, *distance = work->distance;
    const int shift = bits == 8 ? 0 : bits == 4 ? 1 : 2, rest = (1 << shift) - 1, mask = (1 << bits) - 1;
    const uint8_t *codes = (const uint8_t *)work->input;
    for (int64_t map = first; map < last; map++) {
        const float *restrict g = (const float *)work->gradient + map * outs;
        float *restrict out = (float *)work->out + map * ins;
        memset(out, 0, (size_t)ins * sizeof *out);
        for (int64_t o = 0; o < outs; o++) {
            const uint64_t i = (uint64_t)(map * outs + o);
            const int64_t place = start[o] + distance[codes[i >> shift] >> (int)(i & rest) * bits & mask];
            if ((uint64_t)place < (uint64_t)ins) /* a dilated window may lie in the padding with all of its elements */
                out[place] += g[o];
        }
    }
}

static uint32_t scatter_places(const Work *work, int64_t first, int64_t last, int thread) {
    if (work->bits == 8) /* a constant number of bits is shifted faster */
        scatter_maps(work, first, last, 8);
    else if (work->bits == 4)
        scatter_maps(work, first, last, 4);
    else
        scatter_maps(work, first, last, 2);
    return 0;
}

/* Codes of `bits` each, the first one lowest in its byte. */
INLINE void pack_bytes(const uint8_t *restrict codes, int64_t count, int bits, uint8_t *restrict out) {
    const int64_t each = 8 / bits;
    int64_t i = 0;
    if (bits == 2)
        for (; i + 4 <= count; i += 4)
            out[i / 4] = (uint8_t)(codes[i] | codes[i + 1] << 2 | codes[i + 2] << 4 | codes[i + 3] << 6);
    else if (bits == 4)
        for (; i + 2 <= count; i += 2)
            out[i / 2] = (uint8_t)(codes[i] | codes[i + 1] << 4);
    for (; i < count; i++)
        out[i / each] = (uint8_t)((i % each ? out[i / each] : 0) | codes[i] << (i % each * bits));
}

/* The maximum of one window, of which rows `from` to `to` are in the map, and its place: the first of equal elements, and
   a NaN before all, as in torch's kernel. */
INLINE void maximum(
    const float *x, const Window *w, int64_t from, int64_t to, int64_t left, float *out, uint8_t *place) {
    const int64_t rest = w->size[1] - left, last = rest < w->kernel[1] ? rest : w->kernel[1];
    const int64_t first = left < 0 ? -left : 0;
    float most = from_bits(0xFF800000);
    int64_t found = from * w->kernel[1] + first;
    for (int64_t i = from; i < to; i++)
        for (int64_t j = first; j < last; j++) {
            const float value = x[i * w->size[1] + left + j];
            if (value > most || value != value) {
                most = value;
                found = i * w->kernel[1] + j;
            }
        }
    *out = most;
    *place = (uint8_t)found;
}

#ifdef WIDE
/* Those of up to eight windows beside each other, all of whose columns are in the map. A `stride` of 1 or 2 is that of
   eight windows, which are read by whole vectors; with 0 each element is fetched. */
WIDE static inline void maxima_wide(
    const float *x, const Window *w, int64_t from, int64_t to, int stride, int64_t count, float *out, uint8_t *places) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 present = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)count), lanes));
    const __m256i steps = _mm256_mullo_epi32(lanes, _mm256_set1_epi32((int32_t)w->stride[1]));
    __m256 most = _mm256_set1_ps(from_bits(0xFF800000));
    __m256i found = _mm256_set1_epi32((int32_t)(from * w->kernel[1]));
    for (int64_t i = from; i < to; i++)
        for (int64_t j = 0; j < w->kernel[1]; j++) {
            const float *here = x + i * w->size[1] + j;
            __m256 value;
            if (stride == 0)
                value = _mm256_mask_i32gather_ps(most, here, steps, present, 4);
            else
                value = _mm256_loadu_ps(here);
            if (stride == 2) {
                value = _mm256_shuffle_ps(value, _mm256_loadu_ps(here + 7), 0xD8);
                value = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(value), 0xD8));
            }
            const __m256 taken = _mm256_or_ps(
                _mm256_cmp_ps(value, most, _CMP_GT_OQ), _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
            const __m256i place = _mm256_set1_epi32((int32_t)(i * w->kernel[1] + j));
            most = _mm256_blendv_ps(most, value, taken);
            found = _mm256_blendv_epi8(found, place, _mm256_castps_si256(taken));
        }
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
    const __m128i bytes = _mm_packus_epi16(words, words);
    if (count == 8) {
        _mm256_storeu_ps(out, most);
        _mm_storel_epi64((__m128i *)places, bytes);
    } else {
        _mm256_maskstore_ps(out, _mm256_castps_si256(present), most);
        memcpy(places, &bytes, (size_t)count);
    }
}

/* Those of a row of windows, all of whose columns are in the map. */
WIDE static inline void row_wide(
    const float *x, const Window *w, int64_t from, int64_t to, int64_t count, float *out, uint8_t *places) {
    const int64_t stride = w->stride[1];
    for (int64_t k = 0; k < count; k += 8) {
        const int64_t at = k + 8 <= count || count < 8 ? k : count - 8; /* the last ones are done twice */
        if (count >= 8 && stride == 2)
            maxima_wide(x + at * 2, w, from, to, 2, 8, out + at, places + at);
        else if (count >= 8 && stride == 1)
            maxima_wide(x + at, w, from, to, 1, 8, out + at, places + at);
        else
            maxima_wide(x + at * stride, w, from, to, 0, count < 8 ? count : 8, out + at, places + at);
    }
}
#endif

/* The maxima of one map, and a byte for the place of each in its window, which has an element in the map. */
INLINE void maxima_of_map(const float *x, const Window *w, float *out, uint8_t *places, int wide) {
    const int64_t width = w->out[1], stride = w->stride[1], padding = w->padding[1];
    for (int64_t o = 0; o < w->out[0]; o++, out += width, places += width) {
        const int64_t top = o * w->stride[0] - w->padding[0], below = w->size[0] - top;
        const int64_t from = top < 0 ? -top : 0, to = below < w->kernel[0] ? below : w->kernel[0];
        const float *row = x + top * w->size[1];
        int64_t k = 0;
#ifdef WIDE
        const int64_t first = padding ? (padding - 1) / stride + 1 : 0; /* all columns from here to there are in the map */
        const int64_t rest = w->size[1] + padding - w->kernel[1];
        const int64_t inside = rest < 0 ? 0 : rest / stride + 1, last = inside < width ? inside : width;
        if (wide && first < last) {
            for (; k < first; k++)
                maximum(row, w, from, to, k * stride - padding, out + k, places + k);
            row_wide(row + first * stride - padding, w, from, to, last - first, out + first, places + first);
            k = last;
        }
#endif
        for (; k < width; k++)
            maximum(row, w, from, to, k * stride - padding, out + k, places + k);
    }
}

/* Of chunks of maps, as many as fill whole bytes of places. Returns whether there was no memory. */
INLINE uint32_t pool_maps(const Work *work, int64_t first, int64_t last, int thread, int wide) {
    const int64_t ins = work->ins, outs = work->outs, each = 8 / work->bits, chunk = work->group;
    uint8_t *places = (uint8_t *)malloc((size_t)(outs * chunk));
    if (!places)
        return 1;
    for (int64_t part = first; part < last; part++) {
        const int64_t begin = part * chunk, end = begin + chunk < work->count ? begin + chunk : work->count;
        for (int64_t map = begin; map < end; map++)
            maxima_of_map((const float *)work->input + map * ins, &work->window, (float *)work->out + map * outs,
                          places + (map - begin) * outs, wide);
        pack_bytes(places, (end - begin) * outs, work->bits, work->places + begin * outs / each);
    }
    free(places);
    return 0;
}

/* For the processor at hand ------------------------------------------------------------------------------------ */

typedef uint32_t Pass(const Work *work, int64_t first, int64_t last, int thread);

#define PLAIN(pass)                                                                                                    \
    static uint32_t pass##_plain(const Work *work, int64_t first, int64_t last, int thread) {                          \
        return pass(work, first, last, thread, 0);                                                                     \
    }
#ifdef WIDE
#define BOTH(pass)                                                                                                     \
    PLAIN(pass)                                                                                                        \
    WIDE static uint32_t pass##_wide(const Work *work, int64_t first, int64_t last, int thread) {                      \
        return pass(work, first, last, thread, 1);                                                                     \
    }
#define CHOOSE(pass) (is_wide ? pass##_wide : pass##_plain)
#else
#define BOTH(pass) PLAIN(pass)
#define CHOOSE(pass) (pass##_plain)
#endif

BOTH(pack_flags)
BOTH(pool_maps)
BOTH(gate)
BOTH(pack_rows)
BOTH(expand_rows)
BOTH(look_up)
BOTH(sum_rows)
BOTH(combine_rows)

static int is_wide = 0;

/* Rows, or blocks of flags, on several threads, each with a part of them. */
static uint32_t run(Pass *pass, const Work *work, int64_t total, int threads) {
    uint32_t largest = 0;
    const int64_t part = (total + threads - 1) / threads;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : largest) if (threads > 1)
#endif
    for (int thread = 0; thread < threads; thread++) {
        const int64_t first = thread * part, last = first + part < total ? first + part : total;
        const uint32_t found = first < last ? pass(work, first, last, thread) : 0;
        largest = found > largest ? found : largest;
    }
    return largest;
}

/* Python -------------------------------------------------------------------------------------------------------- */

static PyObject *py_pack_flags(PyObject *self, PyObject *args) {
    unsigned long long input, out;
    long long count;
    int threads;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLiffKi", &input, &count, &work.dtype, &work.low, &work.high, &out, &threads))
        return NULL;
    work.input = (const void *)(uintptr_t)input;
    work.out = (void *)(uintptr_t)out;
    work.count = count;
    Py_BEGIN_ALLOW_THREADS
    run(CHOOSE(pack_flags), &work, (count + BLOCK - 1) / BLOCK, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_expand_flags(PyObject *self, PyObject *args) {
    unsigned long long input, out, values;
    long long count;
    int itemsize, threads;
    Work work = {0};
    char table[256 * 8 * 8];
    if (!PyArg_ParseTuple(args, "KLKiKi", &input, &count, &values, &itemsize, &out, &threads))
        return NULL;
    if (itemsize < 1 || itemsize > 8) {
        PyErr_SetString(PyExc_ValueError, "values have 1 to 8 bytes");
        return NULL;
    }
    work.input = (const void *)(uintptr_t)input;
    work.out = (void *)(uintptr_t)out;
    work.count = count;
    work.table = table;
    work.itemsize = itemsize;
    Py_BEGIN_ALLOW_THREADS
    const char *off = (const char *)(uintptr_t)values, *on = off + itemsize;
    for (int entry = 0; entry < 256; entry++)
        for (int k = 0; k < 8; k++)
            memcpy(table + (entry * 8 + k) * itemsize, entry >> (7 - k) & 1 ? on : off, (size_t)itemsize);
    run(expand_flags, &work, (count + BLOCK - 1) / BLOCK, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static int refused(const Work *work) {
    if (work->group >= SHORTEST && work->group <= LONGEST && work->group % 2 == 0 &&
        (work->bits == 4 || work->bits == 8))
        return 0;
    PyErr_SetString(PyExc_ValueError, "groups have an even number of 16 to 256 elements, of 4 or 8 bits");
    return 1;
}

static PyObject *rows(PyObject *args, Pass *pass) {
    unsigned long long input, out, factor, term;
    long long count, channels, inner;
    int threads;
    uint32_t largest;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLiiifKKLLiffKi", &input, &count, &work.dtype, &work.group, &work.bits, &work.scale,
                          &factor, &term, &channels, &inner, &work.cuts, &work.low, &work.high, &out, &threads))
        return NULL;
    if (refused(&work))
        return NULL;
    work.input = (const void *)(uintptr_t)input;
    work.out = (void *)(uintptr_t)out;
    work.count = count;
    work.affine.factor = (const float *)(uintptr_t)factor;
    work.affine.term = (const float *)(uintptr_t)term;
    work.affine.channels = channels;
    work.affine.inner = inner;
    Py_BEGIN_ALLOW_THREADS
    largest = run(pass, &work, (count + work.group - 1) / work.group, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(largest);
}

static PyObject *py_pack_rows(PyObject *self, PyObject *args) { return rows(args, CHOOSE(pack_rows)); }

static PyObject *py_expand_rows(PyObject *self, PyObject *args) { return rows(args, CHOOSE(expand_rows)); }

static PyObject *py_list_levels(PyObject *self, PyObject *args) {
    unsigned long long input, out;
    long long rows;
    int threads;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLifKi", &input, &rows, &work.group, &work.scale, &out, &threads))
        return NULL;
    work.bits = 4;
    if (refused(&work))
        return NULL;
    work.input = (const void *)(uintptr_t)input;
    work.out = (void *)(uintptr_t)out;
    Py_BEGIN_ALLOW_THREADS
    run(list_levels, &work, rows, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_look_up(PyObject *self, PyObject *args) {
    unsigned long long input, table, gradient, out;
    long long count;
    int threads;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLiiKKKi", &input, &count, &work.dtype, &work.group, &table, &gradient, &out, &threads))
        return NULL;
    work.bits = 4;
    if (refused(&work))
        return NULL;
    work.input = (const void *)(uintptr_t)input;
    work.first = (const float *)(uintptr_t)table;
    work.gradient = (const void *)(uintptr_t)gradient;
    work.out = (void *)(uintptr_t)out;
    work.count = count;
    Py_BEGIN_ALLOW_THREADS
    run(CHOOSE(look_up), &work, (count + work.group - 1) / work.group, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_gate(PyObject *self, PyObject *args) {
    unsigned long long input, gradient, out;
    long long count;
    int threads;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLKiKi", &input, &count, &gradient, &work.itemsize, &out, &threads))
        return NULL;
    if (work.itemsize != 2 && work.itemsize != 4) {
        PyErr_SetString(PyExc_ValueError, "gradients have 2 or 4 bytes");
        return NULL;
    }
    work.input = (const void *)(uintptr_t)input;
    work.gradient = (const void *)(uintptr_t)gradient;
    work.out = (void *)(uintptr_t)out;
    work.count = count;
    Py_BEGIN_ALLOW_THREADS
    run(CHOOSE(gate), &work, (count + BLOCK - 1) / BLOCK, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_pack_places(PyObject *self, PyObject *args) {
    unsigned long long input, start, codes, out;
    long long count, outs, distances;
    int threads;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLLKKLiKi", &input, &count, &outs, &start, &codes, &distances, &work.bits, &out,
                          &threads))
        return NULL;
    work.input = (const void *)(uintptr_t)input;
    work.start = (const int64_t *)(uintptr_t)start;
    work.codes = (const uint8_t *)(uintptr_t)codes;
    work.out = (void *)(uintptr_t)out;
    work.count = count;
    work.outs = outs;
    work.ins = distances;
    Py_BEGIN_ALLOW_THREADS
    run(pack_places, &work, (count + BLOCK - 1) / BLOCK, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_max_pool(PyObject *self, PyObject *args) {
    unsigned long long input, out, places;
    long long maps, n[10];
    int threads;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLLLLLLLLLLLiKKi", &input, &maps, n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7,
                          n + 8, n + 9, &work.bits, &out, &places, &threads))
        return NULL;
    work.input = (const void *)(uintptr_t)input;
    work.out = (void *)(uintptr_t)out;
    work.places = (uint8_t *)(uintptr_t)places;
    work.count = maps;
    for (int axis = 0; axis < 2; axis++) {
        work.window.size[axis] = n[axis];
        work.window.out[axis] = n[2 + axis];
        work.window.kernel[axis] = n[4 + axis];
        work.window.stride[axis] = n[6 + axis];
        work.window.padding[axis] = n[8 + axis];
    }
    work.ins = n[0] * n[1];
    work.outs = n[2] * n[3];
    const int each = 8 / work.bits;
    uint32_t failed;
    work.group = work.outs % each == 0 ? 1 : work.outs % 2 == 0 ? each / 2 : each;
    Py_BEGIN_ALLOW_THREADS
    failed = run(CHOOSE(pool_maps), &work, (maps + work.group - 1) / work.group, threads);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_scatter_places(PyObject *self, PyObject *args) {
    unsigned long long input, start, distance, gradient, out;
    long long maps, outs, ins;
    int threads;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLLLKKiKKi", &input, &maps, &outs, &ins, &start, &distance, &work.bits, &gradient,
                          &out, &threads))
        return NULL;
    work.input = (const void *)(uintptr_t)input;
    work.start = (const int64_t *)(uintptr_t)start;
    work.distance = (const int64_t *)(uintptr_t)distance;
    work.gradient = (const void *)(uintptr_t)gradient;
    work.out = (void *)(uintptr_t)out;
    work.outs = outs;
    work.ins = ins;
    Py_BEGIN_ALLOW_THREADS
    run(scatter_places, &work, maps, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* With the normalised input n and the gradient g of each channel's m elements, factor = weight / deviation:
   sums of g, of g * n, and the gradient of the input, factor * (g - sum g / m - n * sum gn / m), or factor * g where
   the statistics are fixed. */
static PyObject *py_norm_backward(PyObject *self, PyObject *args) {
    unsigned long long input, factor, term, gradient, scaled, sums, out;
    long long count, channels, inner;
    int fixed, threads;
    Work work = {0};
    if (!PyArg_ParseTuple(args, "KLiiifKKLLKKiKKi", &input, &count, &work.dtype, &work.group, &work.bits, &work.scale,
                          &factor, &term, &channels, &inner, &gradient, &scaled, &fixed, &sums, &out, &threads))
        return NULL;
    if (refused(&work))
        return NULL;
    float *coefficients = (float *)calloc((size_t)channels * 2, sizeof *coefficients);
    double *partial = (double *)calloc((size_t)channels * 2 * (size_t)threads, sizeof *partial);
    if (!coefficients || !partial) {
        free(coefficients);
        free(partial);
        return PyErr_NoMemory();
    }
    work.input = (const void *)(uintptr_t)input;
    work.gradient = (const void *)(uintptr_t)gradient;
    work.out = (void *)(uintptr_t)out;
    work.count = count;
    work.affine.factor = (const float *)(uintptr_t)factor;
    work.affine.term = (const float *)(uintptr_t)term;
    work.affine.channels = channels;
    work.affine.inner = inner;
    work.sums = partial;
    work.cuts = !fixed;
    work.first = (const float *)(uintptr_t)scaled;
    work.second = coefficients;
    work.third = coefficients + channels;
    Py_BEGIN_ALLOW_THREADS
    const int64_t rows = (count + work.group - 1) / work.group;
    float *found = (float *)(uintptr_t)sums;
    run(CHOOSE(sum_rows), &work, rows, threads);
    for (int64_t c = 0; c < 2 * channels; c++) {
        double sum = 0;
        for (int thread = 0; thread < threads; thread++)
            sum += partial[thread * 2 * channels + c];
        found[c] = (float)sum;
        if (!fixed) /* the sum of products goes with the input, that of gradients stands alone */
            coefficients[c < channels ? c + channels : c - channels] =
                (float)(-sum * work.first[c % channels] * (double)channels / (double)count);
    }
    if (out)
        run(CHOOSE(combine_rows), &work, rows, threads);
    Py_END_ALLOW_THREADS
    free(coefficients);
    free(partial);
    Py_RETURN_NONE;
}

/* Whether the widest instructions are used from now on, where the processor has them; returns whether they were. */
static PyObject *py_widen(PyObject *self, PyObject *args) {
    int on, before = is_wide;
    if (!PyArg_ParseTuple(args, "p", &on))
        return NULL;
#ifdef WIDE
    is_wide = on && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return PyBool_FromLong(before);
}

static PyMethodDef METHODS[] = {
    {"pack_flags", py_pack_flags, METH_VARARGS, NULL},
    {"expand_flags", py_expand_flags, METH_VARARGS, NULL},
    {"pack_rows", py_pack_rows, METH_VARARGS, NULL},
    {"expand_rows", py_expand_rows, METH_VARARGS, NULL},
    {"list_levels", py_list_levels, METH_VARARGS, NULL},
    {"look_up", py_look_up, METH_VARARGS, NULL},
    {"pack_places", py_pack_places, METH_VARARGS, NULL},
    {"max_pool", py_max_pool, METH_VARARGS, NULL},
    {"scatter_places", py_scatter_places, METH_VARARGS, NULL},
    {"gate", py_gate, METH_VARARGS, NULL},
    {"norm_backward", py_norm_backward, METH_VARARGS, NULL},
    {"widen", py_widen, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", NULL, 0, METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
#ifdef WIDE
    is_wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "INTERFACE", 4)) {
        Py_DECREF(module);
        return NULL;
    }
#ifdef Py_GIL_DISABLED
    if (module)
        PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    return module;
}
