// Shared memory, 0xFF bytes before each block: NaN, so that reading what no thread has written is seen.
#pragma once

#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace cnx {
namespace emulation {

// Exactly the bytes asked for, aligned to no more than the 16 bytes that are promised.
class DynamicShared {
 public:
  ~DynamicShared() { std::free(memory_); }

  unsigned char* prepare(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    std::free(memory_);  // a fresh one for every block, between red zones
    memory_ = static_cast<unsigned char*>(std::malloc(bytes));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_, 0xff, bytes);
    return memory_;
#else
    if (!memory_ || bytes > bytes_) {
      std::free(memory_);
      if (posix_memalign(reinterpret_cast<void**>(&memory_), 128, bytes + 2 * kEdge)) throw std::bad_alloc();
    }
    bytes_ = bytes;
    std::memset(memory_, kMark, kEdge);
    std::memset(memory_ + kEdge, 0xff, bytes);
    std::memset(memory_ + kEdge + bytes, kMark, kEdge);
    return memory_ + kEdge;
#endif
  }

  bool intact() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (size_t i = 0; i < kEdge; ++i)
      if (memory_[i] != kMark || memory_[kEdge + bytes_ + i] != kMark) return false;
#endif
    return true;
  }

 private:
  static constexpr size_t kEdge = 16 * 5;  // odd multiple of 16
  static constexpr unsigned char kMark = 0xa5;
  unsigned char* memory_ = nullptr;
  size_t bytes_ = 0;
};

// `__shared__` variables are `static thread_local` variables of functions, which no code can enumerate; the symbol
// table of the loaded file can. Taken are the function-local thread_local variables of namespace cnx::cuda in the file
// this code is linked into, so host functions there must have none. Where there is no symbol table (stripped, not ELF)
// the variables are merely zero at first and afterwards what the last block left.
class StaticShared {
 public:
  // Those of the calling thread.
  StaticShared() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) { return static_cast<StaticShared*>(self)->find(*info); }, this);
  }

  // Most variables belong to other kernels and hold 0xFF still, which a few of their bytes tell.
  void poison() {
    for (const Variable& v : variables_)
      if (written(v)) std::memset(v.address, 0xff, v.size);
  }

 private:
  struct Variable {
    unsigned char* address;
    size_t size;
  };

  static bool written(const Variable& v) {
    constexpr size_t kSamples = 32;
    const size_t step = v.size > kSamples ? v.size / kSamples : 1;
    for (size_t i = 0; i < v.size; i += step)
      if (v.address[i] != 0xff) return true;
    return v.address[v.size - 1] != 0xff;
  }

  int find(const dl_phdr_info& info) {
    const uintptr_t here = reinterpret_cast<uintptr_t>(&written);
    bool mine = false;
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const ElfW(Phdr) & p = info.dlpi_phdr[i];
      mine = mine || (p.p_type == PT_LOAD && here - (info.dlpi_addr + p.p_vaddr) < p.p_memsz);
    }
    if (!mine) return 0;
    const int file = open(*info.dlpi_name ? info.dlpi_name : "/proc/self/exe", O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file >= 0 && fstat(file, &status) == 0) {
      const size_t size = static_cast<size_t>(status.st_size);
      void* image = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
      if (image != MAP_FAILED) {
        read_symbols(static_cast<const char*>(image), static_cast<unsigned char*>(info.dlpi_tls_data));
        munmap(image, size);
      }
    }
    if (file >= 0) close(file);
    return 1;
  }

  void read_symbols(const char* image, unsigned char* thread_storage) {
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image);
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image + header->e_shoff);
    for (int s = 0; thread_storage && s < header->e_shnum; ++s) {
      if (sections[s].sh_type != SHT_SYMTAB) continue;
      const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(image + sections[s].sh_offset);
      const char* names = image + sections[sections[s].sh_link].sh_offset;
      for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
        const char* name = names + symbols[i].st_name;
        if ((symbols[i].st_info & 0xf) == STT_TLS && symbols[i].st_shndx != SHN_UNDEF && symbols[i].st_size &&
            !std::strncmp(name, "_ZZN3cnx4cuda", 13))
          variables_.push_back({thread_storage + symbols[i].st_value, symbols[i].st_size});
      }
    }
  }

  std::vector<Variable> variables_;
};

}  // namespace emulation
}  // namespace cnx
