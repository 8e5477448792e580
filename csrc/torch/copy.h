// Bindings of gather and scatter of patches and of the stem's pixel rows for a device D (cpu.cpp, cuda.cpp).
#pragma once

#include "binding.h"

namespace cnx {
namespace binding {

template <class D>
Tensor gather(const Tensor& x, const Tensor& patch_of_slot, int64_t grid_h, int64_t grid_w) {
  check_device<D>(x, "x");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) % grid_h == 0, "convnextv2_kernels: x must be a dense map of the grid");
  const int64_t side = x.size(1) / grid_h, slots = patch_of_slot.numel(), channels = x.size(3);
  STD_TORCH_CHECK(x.size(2) == grid_w * side, "convnextv2_kernels: x must be a dense map of the grid");
  Tensor y = new_features(x, {slots, side, side, channels});
  const int64_t pixel = channels * static_cast<int64_t>(x.element_size());
  D::gather_patches(
      {x.size(0), grid_h, grid_w, side, slots, pixel, int32_pointer(patch_of_slot, x, slots, "patch_of_slot"), nullptr,
       x.const_data_ptr(), nullptr, y.mutable_data_ptr()},
      x);
  return y;
}

template <class D>
Tensor scatter(const Tensor& x, const Tensor& slot_of_patch, int64_t grid_h, int64_t grid_w,
               const OptionalTensor& fill) {
  check_device<D>(x, "x");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == x.size(2), "convnextv2_kernels: x must be packed patches [P, s, s, C]");
  const int64_t images = slot_of_patch.size(0), side = x.size(1), channels = x.size(3);
  if (fill) {
    check_same_device(*fill, x, "fill");
    STD_TORCH_CHECK(fill->numel() == channels && fill->scalar_type() == x.scalar_type(),
                    "convnextv2_kernels: fill must hold C values of x's dtype");
  }
  Tensor y = new_features(x, {images, grid_h * side, grid_w * side, channels});
  const int64_t pixel = channels * static_cast<int64_t>(x.element_size());
  D::scatter_patches({images, grid_h, grid_w, side, x.size(0), pixel, nullptr,
                      int32_pointer(slot_of_patch, x, images * grid_h * grid_w, "slot_of_patch"), x.const_data_ptr(),
                      pointer(fill), y.mutable_data_ptr()},
                     x);
  return y;
}

template <class D>
Tensor pixel_rows(const Tensor& images, const OptionalTensor& patch_of_slot, int64_t grid_h, int64_t grid_w) {
  check_device<D>(images, "images");
  STD_TORCH_CHECK(images.dim() == 4 && images.size(2) % (4 * grid_h) == 0 && images.size(3) % (4 * grid_w) == 0,
                  "convnextv2_kernels: images must be [N, C, H, W] with sides that are multiples of 4 times the grid");
  const int64_t n = images.size(0), channels = images.size(1), h = images.size(2), w = images.size(3);
  const int64_t side = h / (4 * grid_h), row = channels * 16;
  const int64_t slots = patch_of_slot ? patch_of_slot->numel() : n * grid_h * grid_w;
  STD_TORCH_CHECK(patch_of_slot || side == 1, "convnextv2_kernels: without patch_of_slot the grid must be H/4 x W/4");
  Tensor rows =
      patch_of_slot ? new_features(images, {slots, side, side, row}) : new_features(images, {n, grid_h, grid_w, row});
  D::patch_pixels(
      {channels, h, w, grid_h, grid_w, side, slots, static_cast<int64_t>(images.element_size()),
       int32_pointer(patch_of_slot, images, slots, "patch_of_slot"), images.const_data_ptr(), rows.mutable_data_ptr()},
      images);
  return rows;
}

}  // namespace binding
}  // namespace cnx
