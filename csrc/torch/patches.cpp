// Operators that move patches: gather and scatter, the stem's pixel rows, and the index tensors of a layout.
#include "device_cpu.h"
#include "device_cuda.h"

CNX_SCHEMAS(m) {
  m.def("gather_patches(Tensor x, Tensor patch_of_slot, int grid_h, int grid_w) -> Tensor");
  m.def("scatter_patches(Tensor x, Tensor slot_of_patch, int grid_h, int grid_w, Tensor? fill) -> Tensor");
  m.def("patch_pixels(Tensor images, Tensor? patch_of_slot, int grid_h, int grid_w) -> Tensor");
  // CUDA only
  m.def(
      "layout_from_kept(Tensor ids, int grid_h, int grid_w)"
      " -> (Tensor slot_of_patch, Tensor patch_of_slot, Tensor image_offsets)");
  m.def("neighbour_slots(Tensor slot_of_patch, Tensor patch_of_slot, int grid_h, int grid_w, int radius) -> Tensor");
}

namespace cnx {
namespace binding {
namespace {

template <class D>
Tensor gather_patches(const Tensor& x, const Tensor& patch_of_slot, int64_t grid_h, int64_t grid_w) {
  check_device<D>(x, "x");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) % grid_h == 0, "convnextv2_kernels: x must be a dense map of the grid");
  const int64_t side = x.size(1) / grid_h, slots = patch_of_slot.numel(), channels = x.size(3);
  STD_TORCH_CHECK(x.size(2) == grid_w * side, "convnextv2_kernels: x must be a dense map of the grid");
  Tensor y = new_features(x, {slots, side, side, channels});
  const int64_t pixel = channels * static_cast<int64_t>(x.element_size());
  D::gather_patches(
      {
          .images = x.size(0),
          .grid_h = grid_h,
          .grid_w = grid_w,
          .side = side,
          .slots = slots,
          .pixel_bytes = pixel,
          .patch_of_slot = int32_pointer(patch_of_slot, x, slots, "patch_of_slot"),
          .source = x.const_data_ptr(),
          .target = y.mutable_data_ptr(),
      },
      x);
  return y;
}

template <class D>
Tensor scatter_patches(const Tensor& x, const Tensor& slot_of_patch, int64_t grid_h, int64_t grid_w,
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
  D::scatter_patches(
      {
          .images = images,
          .grid_h = grid_h,
          .grid_w = grid_w,
          .side = side,
          .slots = x.size(0),
          .pixel_bytes = pixel,
          .slot_of_patch = int32_pointer(slot_of_patch, x, images * grid_h * grid_w, "slot_of_patch"),
          .source = x.const_data_ptr(),
          .fill = pointer(fill),
          .target = y.mutable_data_ptr(),
      },
      x);
  return y;
}

template <class D>
Tensor patch_pixels(const Tensor& images, const OptionalTensor& patch_of_slot, int64_t grid_h, int64_t grid_w) {
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
      {
          .channels = channels,
          .height = h,
          .width = w,
          .grid_h = grid_h,
          .grid_w = grid_w,
          .side = side,
          .slots = slots,
          .element_bytes = static_cast<int64_t>(images.element_size()),
          .patch_of_slot = int32_pointer(patch_of_slot, images, slots, "patch_of_slot"),
          .images = images.const_data_ptr(),
          .rows = rows.mutable_data_ptr(),
      },
      images);
  return rows;
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> layout_from_kept(const Tensor& ids, int64_t grid_h, int64_t grid_w) {
  check_device<D>(ids, "ids");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long,
                  "convnextv2_kernels: ids must be int64 [N, K]");
  const int64_t images = ids.size(0), kept = ids.size(1);
  const auto int32 = std::make_optional(ScalarType::Int);
  Tensor slot_of_patch = torch::stable::new_empty(ids, {images, grid_h * grid_w}, int32);
  Tensor patch_of_slot = torch::stable::new_empty(ids, {images * kept}, int32);
  Tensor offsets = torch::stable::new_empty(ids, {images + 1}, int32);
  D::layout_from_kept(
      {
          .images = images,
          .grid_h = grid_h,
          .grid_w = grid_w,
          .kept = kept,
          .ids = static_cast<const int64_t*>(ids.const_data_ptr()),
          .slot_of_patch = static_cast<int32_t*>(slot_of_patch.mutable_data_ptr()),
          .patch_of_slot = static_cast<int32_t*>(patch_of_slot.mutable_data_ptr()),
          .image_offsets = static_cast<int32_t*>(offsets.mutable_data_ptr()),
      },
      ids);
  return {slot_of_patch, patch_of_slot, offsets};
}

template <class D>
Tensor neighbour_slots(const Tensor& slot_of_patch, const Tensor& patch_of_slot, int64_t grid_h, int64_t grid_w,
                       int64_t radius) {
  check_device<D>(slot_of_patch, "slot_of_patch");
  const int64_t images = slot_of_patch.size(0), slots = patch_of_slot.numel(), width = 2 * radius + 1;
  Tensor table = torch::stable::new_empty(slot_of_patch, {slots, width * width});
  D::neighbour_slots(
      {
          .images = images,
          .grid_h = grid_h,
          .grid_w = grid_w,
          .slots = slots,
          .radius = static_cast<int>(radius),
          .slot_of_patch = int32_pointer(slot_of_patch, patch_of_slot, images * grid_h * grid_w, "slot_of_patch"),
          .patch_of_slot = int32_pointer(patch_of_slot, slot_of_patch, slots, "patch_of_slot"),
          .neighbours = static_cast<int32_t*>(table.mutable_data_ptr()),
      },
      slot_of_patch);
  return table;
}

template <class D>
void implement(Library& m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches<D>));
  m.impl("scatter_patches", TORCH_BOX(&scatter_patches<D>));
  m.impl("patch_pixels", TORCH_BOX(&patch_pixels<D>));
}

template <class D>
void implement_cuda(Library& m) {
  m.impl("layout_from_kept", TORCH_BOX(&layout_from_kept<D>));
  m.impl("neighbour_slots", TORCH_BOX(&neighbour_slots<D>));
}

}  // namespace
}  // namespace binding
}  // namespace cnx

CNX_IMPLEMENT_CPU(cnx::binding::implement)
CNX_IMPLEMENT_CUDA(cnx::binding::implement)
CNX_IMPLEMENT_CUDA(cnx::binding::implement_cuda)
