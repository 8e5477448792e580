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

// Patches that a neighbour may be away: far more than a kernel of any size reaches.
constexpr int64_t kMostReach = 255;

template <class D>
Tensor gather_patches(const Tensor& x, const Tensor& patch_of_slot, int64_t grid_h, int64_t grid_w) {
  check_device<D>(x, "x");
  CNX_CHECK(x.dim() == 4, "x must be [N, Gh s, Gw s, C]");
  const int64_t patches = patch_count(x.size(0), grid_h, grid_w);
  const int64_t side = x.size(1) / grid_h, slots = patch_of_slot.numel(), channels = x.size(3);
  CNX_CHECK(x.size(1) % grid_h == 0 && x.size(2) == product({grid_w, side}, "the width of the map"), "x is ", x.size(1),
            "x", x.size(2), " pixels, expected ", grid_h, "s x ", grid_w, "s");
  const int32_t* table =
      index_pointer<D>(patch_of_slot, x, {.count = slots, .low = 0, .high = patches - 1}, "patch_of_slot");
  product({slots, side, side, channels}, "the size of the patches");
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
          .patch_of_slot = table,
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
  CNX_CHECK(x.dim() == 4 && x.size(1) == x.size(2), "x must be packed patches [P, s, s, C]");
  CNX_CHECK(slot_of_patch.dim() >= 1, "slot_of_patch must be [N, Gh Gw]");
  const int64_t images = slot_of_patch.size(0), side = x.size(1), channels = x.size(3);
  if (fill) {
    check_same_device(*fill, x, "fill");
    CNX_CHECK(fill->numel() == channels && fill->scalar_type() == x.scalar_type(),
              "fill must hold C values of x's dtype");
  }
  const int64_t patches = patch_count(images, grid_h, grid_w);
  const int32_t* table =
      index_pointer<D>(slot_of_patch, x, {.count = patches, .low = -1, .high = x.size(0) - 1}, "slot_of_patch");
  product({images, product({grid_h, side}, "the height of the map"), product({grid_w, side}, "the width of the map"),
           channels},
          "the size of the map");
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
          .slot_of_patch = table,
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
  CNX_CHECK(images.dim() == 4, "images must be [N, C, H, W]");
  const int64_t n = images.size(0), channels = images.size(1), h = images.size(2), w = images.size(3);
  const int64_t patches = patch_count(n, grid_h, grid_w), side = h / (4 * grid_h);
  const int64_t row = product({channels, 16}, "the size of a pixel of 4x4");
  CNX_CHECK(h == 4 * grid_h * side && w == product({4, grid_w, side}, "the width of the images"), "images are ", h, "x",
            w, " pixels, expected ", grid_h, "s x ", grid_w, "s with s a multiple of 4");
  CNX_CHECK(patch_of_slot || side == 1, "without patch_of_slot the grid must be H/4 x W/4");
  const int64_t slots = patch_of_slot ? patch_of_slot->numel() : patches;
  const int32_t* table =
      index_pointer<D>(patch_of_slot, images, {.count = slots, .low = 0, .high = patches - 1}, "patch_of_slot");
  product({slots, side, side, row}, "the size of the patches");
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
          .patch_of_slot = table,
          .images = images.const_data_ptr(),
          .rows = rows.mutable_data_ptr(),
      },
      images);
  return rows;
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> layout_from_kept(const Tensor& ids, int64_t grid_h, int64_t grid_w) {
  check_device<D>(ids, "ids");
  CNX_CHECK(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long, "ids must be int64 [N, K]");
  const int64_t images = ids.size(0), kept = ids.size(1);
  patch_count(images, grid_h, grid_w);
  check_from(kept, 0, patch_count(1, grid_h, grid_w), "the number of patches kept");
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
  CNX_CHECK(slot_of_patch.dim() >= 1, "slot_of_patch must be [N, Gh Gw]");
  check_from(radius, 0, kMostReach, "radius");
  const int64_t images = slot_of_patch.size(0), slots = patch_of_slot.numel(), width = 2 * radius + 1;
  const int64_t patches = patch_count(images, grid_h, grid_w);
  const int32_t* slot_table =
      index_pointer<D>(slot_of_patch, patch_of_slot, {.count = patches, .low = -1, .high = slots - 1}, "slot_of_patch");
  const int32_t* patch_table =
      index_pointer<D>(patch_of_slot, slot_of_patch, {.count = slots, .low = 0, .high = patches - 1}, "patch_of_slot");
  product({slots, width, width}, "the number of neighbours");
  Tensor table = torch::stable::new_empty(slot_of_patch, {slots, width * width});
  D::neighbour_slots(
      {
          .images = images,
          .grid_h = grid_h,
          .grid_w = grid_w,
          .slots = slots,
          .radius = static_cast<int>(radius),
          .slot_of_patch = slot_table,
          .patch_of_slot = patch_table,
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
