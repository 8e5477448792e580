// Operators that read the visible rows of a dense map where they lie, and write gradients to those places.
#include "device_cpu.h"
#include "device_cuda.h"

CNX_SCHEMAS(m) {
  m.def(
      "gather_normalize(Tensor x, Tensor patch_of_slot, int grid_h, int grid_w, Tensor? weight, Tensor? bias,"
      " float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "normalized_backward_put(Tensor dy, Tensor z, Tensor rstd, Tensor? weight, Tensor patch_of_slot, int grid_h,"
      " int grid_w, Tensor(a!) dx) -> (Tensor dweight, Tensor dbias)");
  m.def("put_patches(Tensor x, Tensor patch_of_slot, int grid_h, int grid_w, Tensor(a!) out) -> ()");
}

namespace cnx {
namespace binding {
namespace {

struct Slots {
  int64_t side, count;
  const int32_t* patch_of_slot;
};

// The slots of a dense map [N, Gh s, Gw s, C].
template <class D>
Slots slots_of(const Tensor& map, const char* name, const Tensor& patch_of_slot, int64_t grid_h, int64_t grid_w) {
  CNX_CHECK(map.dim() == 4, name, " must be [N, Gh s, Gw s, C]");
  const int64_t patches = patch_count(map.size(0), grid_h, grid_w), side = map.size(1) / grid_h;
  CNX_CHECK(map.size(1) % grid_h == 0 && map.size(2) == product({grid_w, side}, "the width of the map"), name, " is ",
            map.size(1), "x", map.size(2), " pixels, expected ", grid_h, "s x ", grid_w, "s");
  CNX_CHECK(patch_of_slot.dim() == 1, "patch_of_slot must be [P]");
  check_from(side, 0, UINT16_MAX, "the side of a patch");
  const int64_t count = patch_of_slot.numel();
  const int32_t* table =
      index_pointer<D>(patch_of_slot, map, {.count = count, .low = 0, .high = patches - 1}, "patch_of_slot");
  product({count, side, side, map.size(3)}, "the size of the patches");
  return {.side = side, .count = count, .patch_of_slot = table};
}

// Packed rows that belong to a map `out` which is written.
void check_packed(const Tensor& x, const Tensor& out, const Slots& slots, const char* name) {
  CNX_CHECK(out.scalar_type() == x.scalar_type(), name, " must have the dtype of the features");
  CNX_CHECK(x.numel() == slots.count * slots.side * slots.side * out.size(3),
            "the features must be the packed patches [P, s, s, C] of ", name);
}

template <class D>
std::tuple<Tensor, Tensor> gather_normalize(const Tensor& x, const Tensor& patch_of_slot, int64_t grid_h,
                                            int64_t grid_w, const OptionalTensor& weight, const OptionalTensor& bias,
                                            double eps) {
  check_rows<D>(x, "x");
  check_eps(eps);
  const Slots slots = slots_of<D>(x, "x", patch_of_slot, grid_h, grid_w);
  const int64_t channels = last_size(x), side = slots.side;
  if (weight) check_stat(*weight, x, channels, "weight");
  if (bias) check_stat(*bias, x, channels, "bias");
  Tensor y = new_features(x, {slots.count, side, side, channels}), rstd = new_stat(x, {slots.count, side, side});
  D::gather_norm_forward(
      {
          .dtype = D::dtype_of(x),
          .grid_h = grid_h,
          .grid_w = grid_w,
          .side = side,
          .slots = slots.count,
          .channels = channels,
          .patch_of_slot = slots.patch_of_slot,
          .x = x.const_data_ptr(),
          .weight = pointer(weight),
          .bias = pointer(bias),
          .eps = eps,
          .out = y.mutable_data_ptr(),
          .rstd = rstd.mutable_data_ptr(),
      },
      x);
  return {y, rstd};
}

template <class D>
std::tuple<Tensor, Tensor> normalized_backward_put(const Tensor& dy, const Tensor& z, const Tensor& rstd,
                                                   const OptionalTensor& weight, const Tensor& patch_of_slot,
                                                   int64_t grid_h, int64_t grid_w, Tensor dx) {
  check_rows<D>(z, "z");
  check_like(dy, z, "dy");
  const int64_t channels = last_size(z);
  check_stat(rstd, z, row_count(z), "rstd");
  if (weight) check_stat(*weight, z, channels, "weight");
  check_same_device(dx, z, "dx");
  const Slots slots = slots_of<D>(dx, "dx", patch_of_slot, grid_h, grid_w);
  CNX_CHECK(last_size(dx) == channels, "dx must have the ", channels, " channels of z, got ", last_size(dx));
  check_packed(z, dx, slots, "dx");
  check_written(dx, dy, false, "dx");
  check_written(dx, z, false, "dx");
  check_written(dx, rstd, false, "dx");
  if (weight) check_written(dx, *weight, false, "dx");
  const int64_t sums = weight ? channels : 0;
  Tensor dweight = new_stat(z, {sums}), dbias = new_stat(z, {sums});
  D::gather_norm_backward(
      {
          .dtype = D::dtype_of(z),
          .grid_h = grid_h,
          .grid_w = grid_w,
          .side = slots.side,
          .slots = slots.count,
          .channels = channels,
          .patch_of_slot = slots.patch_of_slot,
          .x = dy.const_data_ptr(),
          .weight = pointer(weight),
          .z = z.const_data_ptr(),
          .out = dx.mutable_data_ptr(),
          .rstd = const_cast<void*>(rstd.const_data_ptr()),
          .dweight = sums ? dweight.mutable_data_ptr() : nullptr,
          .dbias = sums ? dbias.mutable_data_ptr() : nullptr,
      },
      z);
  return {dweight, dbias};
}

template <class D>
void put_patches(const Tensor& x, const Tensor& patch_of_slot, int64_t grid_h, int64_t grid_w, Tensor out) {
  check_device<D>(x, "x");
  check_same_device(out, x, "out");
  const Slots slots = slots_of<D>(out, "out", patch_of_slot, grid_h, grid_w);
  CNX_CHECK(last_size(x) == last_size(out), "out must have the ", last_size(x), " channels of x, got ", last_size(out));
  check_packed(x, out, slots, "out");
  check_written(out, x, false, "out");
  D::put_patches(
      {
          .images = out.size(0),
          .grid_h = grid_h,
          .grid_w = grid_w,
          .side = slots.side,
          .slots = slots.count,
          .pixel_bytes = out.size(3) * static_cast<int64_t>(out.element_size()),
          .patch_of_slot = slots.patch_of_slot,
          .source = x.const_data_ptr(),
          .target = out.mutable_data_ptr(),
      },
      x);
}

template <class D>
void implement(Library& m) {
  m.impl("gather_normalize", TORCH_BOX(&gather_normalize<D>));
  m.impl("normalized_backward_put", TORCH_BOX(&normalized_backward_put<D>));
  m.impl("put_patches", TORCH_BOX(&put_patches<D>));
}

}  // namespace
}  // namespace binding
}  // namespace cnx

CNX_IMPLEMENT_CPU(cnx::binding::implement)
CNX_IMPLEMENT_CUDA(cnx::binding::implement)
