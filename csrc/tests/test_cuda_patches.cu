// The CUDA copies between dense maps and packed patches, and the index of visible patches, run by the emulation,
// against plain loops. Buffers are exactly sized and filled with a sentinel.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../cuda/common/launch.cuh"
#include "cnx/cuda.h"
#include "harness.h"

using namespace cnx;
using namespace test;

namespace {

using Bytes = std::vector<unsigned char>;
const cuda::Launch kLaunch{};

Bytes random_bytes(int64_t size, Random& random) {
  Bytes bytes(size);
  for (auto& b : bytes) b = static_cast<unsigned char>(128 + 127 * random.uniform());
  return bytes;
}

struct Layout {
  std::vector<int32_t> slot_of_patch, patch_of_slot;
  Layout(int64_t patches, double hidden, Random& random) {
    for (int64_t i = 0; i < patches; ++i) {
      const bool visible = random.uniform() > hidden;
      slot_of_patch.push_back(visible ? static_cast<int32_t>(patch_of_slot.size()) : -1);
      if (visible) patch_of_slot.push_back(static_cast<int32_t>(i));
    }
  }
  int64_t slots() const { return static_cast<int64_t>(patch_of_slot.size()); }
};

void test_copy(int64_t images, int64_t gh, int64_t gw, int64_t side, int64_t pixel, double hidden, bool with_fill,
               int64_t shift) {
  Random random(images + gh * 3 + gw * 5 + side * 7 + pixel * 11 + with_fill);
  const Layout layout(images * gh * gw, hidden, random);
  const int64_t sites = images * gh * gw * side * side, rows = layout.slots() * side * side;
  const Bytes dense = random_bytes(sites * pixel + shift, random), packed = random_bytes(rows * pixel + shift, random);
  const Bytes fill = random_bytes(pixel + shift, random);
  Bytes expected_packed(rows * pixel), expected_dense(sites * pixel, 0);
  const int64_t height = gh * side, width = gw * side;
  for (int64_t site = 0; site < images * height * width; ++site) {
    const int64_t image = site / (height * width), y = site / width % height, x = site % width;
    const int64_t slot = layout.slot_of_patch[(image * gh + y / side) * gw + x / side];
    const int64_t row = (slot * side + y % side) * side + x % side;
    if (slot >= 0) {
      std::memcpy(&expected_packed[row * pixel], &dense[shift + site * pixel], pixel);
      std::memcpy(&expected_dense[site * pixel], &packed[shift + row * pixel], pixel);
    } else if (with_fill) {
      std::memcpy(&expected_dense[site * pixel], &fill[shift], pixel);
    }
  }
  char what[120];
  std::snprintf(what, sizeof what, "%dx%dx%d side %d pixel %d hidden %g fill %d shift %d", int(images), int(gh),
                int(gw), int(side), int(pixel), hidden, with_fill, int(shift));
  Bytes got_packed(rows * pixel + shift, 0xab), got_dense(sites * pixel + shift, 0xab);
  PatchCopy p{.images = images,
              .grid_h = gh,
              .grid_w = gw,
              .side = side,
              .slots = layout.slots(),
              .pixel_bytes = pixel,
              .patch_of_slot = layout.patch_of_slot.data(),
              .slot_of_patch = layout.slot_of_patch.data(),
              .source = dense.data() + shift,
              .target = got_packed.data() + shift};
  cuda::gather_patches(p, kLaunch);
  check(std::equal(expected_packed.begin(), expected_packed.end(), got_packed.begin() + shift), what);
  p.source = packed.data() + shift;
  p.fill = with_fill ? fill.data() + shift : nullptr;
  p.target = got_dense.data() + shift;
  cuda::scatter_patches(p, kLaunch);
  check(std::equal(expected_dense.begin(), expected_dense.end(), got_dense.begin() + shift), what);
  for (int64_t i = 0; i < shift; ++i) check(got_packed[i] == 0xab && got_dense[i] == 0xab, "written before the start");
}

void test_pixels(int64_t images, int64_t channels, int64_t gh, int64_t gw, int64_t side, int64_t element, double hidden,
                 bool every, int64_t shift) {
  Random random(images + channels + gh * 3 + gw * 5 + side * 7 + element);
  const Layout layout(images * gh * gw, every ? -2 : hidden, random);
  const int64_t height = gh * side * 4, width = gw * side * 4, row = channels * 16;
  const Bytes source = random_bytes(images * channels * height * width * element + shift, random);
  Bytes expected(layout.slots() * side * side * row * element), got(expected.size() + shift, 0xab);
  for (int64_t slot = 0; slot < layout.slots(); ++slot)
    for (int64_t i = 0; i < side * side * row; ++i) {
      const int64_t patch = layout.patch_of_slot[slot], image = patch / (gh * gw);
      const int64_t pixel = i / row, c = i % row / 16, dy = i % 16 / 4, dx = i % 4;
      const int64_t y = (patch / gw % gh * side + pixel / side) * 4 + dy,
                    x = (patch % gw * side + pixel % side) * 4 + dx;
      std::memcpy(&expected[(slot * side * side * row + i) * element],
                  &source[shift + (((image * channels + c) * height + y) * width + x) * element], element);
    }
  const PatchPixels p{.channels = channels,
                      .height = height,
                      .width = width,
                      .grid_h = gh,
                      .grid_w = gw,
                      .side = side,
                      .slots = layout.slots(),
                      .element_bytes = element,
                      .patch_of_slot = every ? nullptr : layout.patch_of_slot.data(),
                      .images = source.data() + shift,
                      .rows = got.data() + shift};
  cuda::patch_pixels(p, kLaunch);
  check(std::equal(expected.begin(), expected.end(), got.begin() + shift), "patch pixels", double(element));
}

void test_layout(int64_t images, int64_t gh, int64_t gw, int64_t kept) {
  Random random(images * 31 + gh * 7 + gw + kept);
  const int64_t cells = gh * gw;
  std::vector<int64_t> ids;
  std::vector<int32_t> slots(images * cells, -1), patches, offsets;
  for (int64_t n = 0; n < images; ++n) {
    std::vector<int64_t> order(cells);
    for (int64_t i = 0; i < cells; ++i) order[i] = i;
    for (int64_t i = 0; i < kept; ++i)
      std::swap(order[i], order[std::min(cells - 1, i + int64_t((random.uniform() + 1) / 2 * double(cells - i)))]);
    ids.insert(ids.end(), order.begin(), order.begin() + kept);
    std::sort(order.begin(), order.begin() + kept);
    offsets.push_back(static_cast<int32_t>(patches.size()));
    for (int64_t i = 0; i < kept; ++i) {
      slots[n * cells + order[i]] = static_cast<int32_t>(patches.size());
      patches.push_back(static_cast<int32_t>(n * cells + order[i]));
    }
  }
  offsets.push_back(static_cast<int32_t>(patches.size()));
  std::vector<int32_t> got_slots(slots.size(), -7), got_patches(patches.size(), -7), got_offsets(images + 1, -7);
  cuda::layout_from_kept({.images = images,
                          .grid_h = gh,
                          .grid_w = gw,
                          .kept = kept,
                          .ids = ids.data(),
                          .slot_of_patch = got_slots.data(),
                          .patch_of_slot = got_patches.data(),
                          .image_offsets = got_offsets.data()},
                         kLaunch);
  check(got_slots == slots, "slot_of_patch", double(cells));
  check(got_patches == patches, "patch_of_slot", double(cells));
  check(got_offsets == offsets, "image_offsets", double(cells));

  for (int radius : {0, 1, 3}) {
    if (cells > 1000 && radius > 1) continue;
    std::vector<int32_t> expected, got(patches.size() * (2 * radius + 1) * (2 * radius + 1), -7);
    for (const int64_t patch : patches)
      for (int64_t dr = -radius; dr <= radius; ++dr)
        for (int64_t dc = -radius; dc <= radius; ++dc) {
          const int64_t r = patch / gw % gh + dr, c = patch % gw + dc;
          const bool inside = r >= 0 && r < gh && c >= 0 && c < gw;
          expected.push_back(inside ? slots[patch / cells * cells + r * gw + c] : -1);
        }
    cuda::neighbour_slots({.images = images,
                           .grid_h = gh,
                           .grid_w = gw,
                           .slots = static_cast<int64_t>(patches.size()),
                           .radius = radius,
                           .slot_of_patch = got_slots.data(),
                           .patch_of_slot = got_patches.data(),
                           .neighbours = got.data()},
                          kLaunch);
    check(got == expected, "neighbours", radius);
  }
}

// Ids that are out of range or repeated: nothing outside the tensors is written, and every slot names a patch.
void test_wrong_ids() {
  const std::vector<int64_t> ids = {-1, 3, 99, 3, INT64_MAX, INT64_MIN, 0, 5};
  std::vector<int32_t> slots(2 * 6, -7), patches(8, -7), offsets(3, -7);
  cuda::layout_from_kept({.images = 2,
                          .grid_h = 2,
                          .grid_w = 3,
                          .kept = 4,
                          .ids = ids.data(),
                          .slot_of_patch = slots.data(),
                          .patch_of_slot = patches.data(),
                          .image_offsets = offsets.data()},
                         kLaunch);
  for (const int32_t patch : patches) check(patch >= 0 && patch < 12, "patch of a wrong id", patch);
  for (const int32_t slot : slots) check(slot >= -1 && slot < 8, "slot of a wrong id", slot);
}

// The assertions on index tables, which a debug build makes on a GPU too.
void test_assertions() {
  const auto passes = [](const auto& assertion) {
    try {
      assertion();
    } catch (const std::runtime_error&) {
      return false;
    }
    return true;
  };
  const auto indices = [&](std::vector<int32_t> entries, int64_t low, int64_t high) {
    const auto count = static_cast<int64_t>(entries.size());
    return passes(
        [&] { cuda::assert_indices({.entries = entries.data(), .count = count, .low = low, .high = high}, kLaunch); });
  };
  const auto offsets = [&](std::vector<int32_t> entries, int64_t rows_per_slot, int64_t rows) {
    const auto count = static_cast<int64_t>(entries.size()) - 1;
    return passes([&] {
      cuda::assert_offsets({.offsets = entries.data(), .rows_per_slot = rows_per_slot, .count = count, .rows = rows},
                           kLaunch);
    });
  };
  check(indices({-1, 0, 4}, -1, 4), "indices in range");
  check(indices({}, 0, -1), "no indices");
  check(offsets({0, 3, 3, 5}, 4, 20), "offsets that rise");
  check(offsets({7, 7, 9}, 1, 2), "offsets of a chunk");
  check(offsets({2}, 1, 0), "offsets of no segment");
  const std::vector<int32_t> many(1000, 3);
  for (const int32_t wrong : {-2, 5, INT32_MAX, INT32_MIN})
    for (const size_t place : {0, 255, 999}) {
      std::vector<int32_t> entries = many;
      entries[place] = wrong;
      check(!indices(entries, -1, 4), "an index out of range", wrong);
    }
  check(!offsets({0, 4, 3, 5}, 4, 20), "offsets that fall");
  check(!offsets({-1, 3, 5}, 1, 6), "a negative offset");
  check(!offsets({0, 3, 5}, 4, 24), "offsets of other rows");
}

}  // namespace

int main() {
  for (int64_t side : {8, 4, 3, 2, 1})
    for (int64_t pixel : {1, 2, 6, 10, 34, 80, 192, 260})
      for (bool fill : {false, true})
        for (double hidden : {0.2, -2.0, 2.0}) test_copy(3, 2, 3, side, pixel, hidden, fill, 0);
  for (int64_t shift : {1, 2, 4, 8}) test_copy(2, 3, 2, 4, 48, 0.2, true, shift);
  test_copy(0, 2, 3, 8, 12, 0, true, 0);
  test_copy(1, 1, 1, 16, 4096, -2, false, 0);
  for (int64_t element : {2, 4, 8})
    for (int64_t side : {8, 2, 1})
      for (int64_t channels : {3, 1, 5}) {
        test_pixels(2, channels, 3, 2, side, element, 0.2, false, 0);
        test_pixels(2, channels, 2, 3, side, element, 0, true, 0);
      }
  for (int64_t element : {2, 4, 8}) test_pixels(2, 3, 2, 2, 8, element, 0.2, false, element);
  test_pixels(1, 3, 2, 2, 8, 4, 2, false, 0);
  test_pixels(0, 3, 2, 2, 8, 4, 0, true, 0);

  test_layout(5, 7, 7, 19);
  test_layout(3, 7, 5, 35);
  test_layout(3, 1, 9, 0);
  test_layout(0, 7, 7, 19);
  test_layout(2, 1, 1, 1);
  test_layout(2, 16, 16, 100);
  test_layout(2, 100, 90, 3000);
  test_layout(1, 128, 128, 8192 + 5);
  test_wrong_ids();
  test_assertions();
  return exit_code();
}
