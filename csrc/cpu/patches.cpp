// Gather and scatter of patches, and the stem's pixel rows: memory moves of whole runs of pixels.
#include <cstring>

#include "cnx/cpu.h"

namespace cnx {
namespace {

template <class F>
void parallel_for(const Threads& threads, int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  threads.run(
      0, count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Byte offset of the first pixel of a patch in a dense NHWC map.
int64_t dense_offset(const PatchCopy& p, int64_t patch) {
  const int64_t per_image = p.grid_h * p.grid_w;
  const int64_t image = patch / per_image, row = patch % per_image / p.grid_w, col = patch % p.grid_w;
  return ((image * p.grid_h + row) * p.side * p.grid_w + col) * p.side * p.pixel_bytes;
}

}  // namespace

void gather_patches(const PatchCopy& p, const Threads& threads) {
  const int64_t run = p.side * p.pixel_bytes, line = p.grid_w * run;
  parallel_for(threads, p.slots, 4, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const char* source = static_cast<const char*>(p.source) + dense_offset(p, p.patch_of_slot[slot]);
      char* target = static_cast<char*>(p.target) + slot * p.side * run;
      for (int64_t y = 0; y < p.side; ++y) std::memcpy(target + y * run, source + y * line, run);
    }
  });
}

void put_patches(const PatchCopy& p, const Threads& threads) {
  const int64_t run = p.side * p.pixel_bytes, line = p.grid_w * run;
  parallel_for(threads, p.slots, 4, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const char* source = static_cast<const char*>(p.source) + slot * p.side * run;
      char* target = static_cast<char*>(p.target) + dense_offset(p, p.patch_of_slot[slot]);
      for (int64_t y = 0; y < p.side; ++y) std::memcpy(target + y * line, source + y * run, run);
    }
  });
}

void scatter_patches(const PatchCopy& p, const Threads& threads) {
  const int64_t run = p.side * p.pixel_bytes, line = p.grid_w * run;
  parallel_for(threads, p.images * p.grid_h * p.grid_w, 4, [&](int64_t begin, int64_t end) {
    for (int64_t patch = begin; patch < end; ++patch) {
      const int64_t slot = p.slot_of_patch[patch];
      char* target = static_cast<char*>(p.target) + dense_offset(p, patch);
      const char* source = static_cast<const char*>(p.source) + slot * p.side * run;
      for (int64_t y = 0; y < p.side; ++y) {
        if (slot >= 0)
          std::memcpy(target + y * line, source + y * run, run);
        else if (!p.fill)
          std::memset(target + y * line, 0, run);
        else
          for (int64_t x = 0; x < p.side; ++x)
            std::memcpy(target + y * line + x * p.pixel_bytes, p.fill, p.pixel_bytes);
      }
    }
  });
}

void patch_pixels(const PatchPixels& p, const Threads& threads) {
  constexpr int64_t stride = 4;
  const int64_t run = stride * p.element_bytes, row_bytes = p.channels * stride * run;
  const int64_t per_image = p.grid_h * p.grid_w;
  parallel_for(threads, p.slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t patch = p.patch_of_slot ? p.patch_of_slot[slot] : slot;
      const int64_t image = patch / per_image, row = patch % per_image / p.grid_w, col = patch % p.grid_w;
      char* target = static_cast<char*>(p.rows) + slot * p.side * p.side * row_bytes;
      for (int64_t y = 0; y < p.side; ++y)
        for (int64_t x = 0; x < p.side; ++x, target += row_bytes)
          for (int64_t c = 0; c < p.channels; ++c)
            for (int64_t dy = 0; dy < stride; ++dy) {
              const int64_t line = (row * p.side + y) * stride + dy;
              const int64_t pixel =
                  ((image * p.channels + c) * p.height + line) * p.width + (col * p.side + x) * stride;
              std::memcpy(target + (c * stride + dy) * run,
                          static_cast<const char*>(p.images) + pixel * p.element_bytes, run);
            }
    }
  });
}

void transpose_f32(const float* x, int64_t rows, int64_t cols, float* out, const Threads& threads) {
  constexpr int64_t tile = 16;
  parallel_for(threads, (cols + tile - 1) / tile, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r0 = 0; r0 < rows; r0 += tile)
      for (int64_t block = begin; block < end; ++block) {
        const int64_t c0 = block * tile, c1 = c0 + tile < cols ? c0 + tile : cols;
        const int64_t r1 = r0 + tile < rows ? r0 + tile : rows;
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t r = r0; r < r1; ++r) out[c * rows + r] = x[r * cols + c];
      }
  });
}

}  // namespace cnx
