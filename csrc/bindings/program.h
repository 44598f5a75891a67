// Launches of kernels: run at once and, while a Recorder is active in the thread, kept, so that a
// Program can run them again on other memory.
//
// A launch is a structure of arguments and the function that runs it. The structure's pointers to
// tensors are known one by one (Launch::reads, Launch::writes); a Program keeps a copy of the
// structure and sets them anew at each run.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "tensor_arg.h"

// A pointer among a launch's arguments, `offset` bytes from their start.
struct Access {
  std::size_t offset;
  Span span;
  bool written;              // or, of a call of Python's, what is not an input of the program
  bool replaceable = false;  // see Launch::may_replace
  bool unknown = false;      // whether only the program can tell if it is written
};

// Runs a launch on the stream of that handle, which launches on the CPU have no use for.
using Kernel = void (*)(void* arguments, std::uintptr_t stream);

struct RecordedLaunch {
  Kernel kernel;
  std::vector<std::byte> arguments;
  std::vector<Access> accesses;
};

// Runs the kernel unless kernels are stubbed. Called without the interpreter's lock.
void run_kernel(Kernel kernel, void* arguments, std::uintptr_t stream,
                const std::vector<Access>& accesses);

// Whether Python asked for the host's part only: kernels then do not run.
bool kernels_are_stubbed();

#ifdef RESNET_FUSED_HOST_SIM
// Whether the simulator was told which memory the next launch may touch; otherwise that is what the
// launch's tensors cover.
extern bool buffers_given;
#endif

class Program;

// Keeps the launches of the thread in which it is active, with the tensors behind their pointers:
// memory that one launch wrote thus never serves for another tensor meanwhile.
class Recorder {
 public:
  ~Recorder() { stop(); }

  static Recorder* active();
  void start();
  void stop();

  std::size_t size() const { return launches_.size(); }
  void add(RecordedLaunch launch) { launches_.push_back(std::move(launch)); }
  void keep(PyObject* tensor) {
    kept_.push_back(pybind11::reinterpret_borrow<pybind11::object>(tensor));
  }

  // Adds a launch that Python makes: function(address, ...) of the tensors, None for an absent one.
  void add_call(const pybind11::object& function,
                const std::vector<std::optional<TensorArg>>& tensors);

  // Launches `first` to before `last` as a function from `inputs` to `outputs`, which read
  // `constants` besides; None where they read anything else, write anything but their own
  // intermediates, or leave part of an output unwritten, and where inputs and outputs overlap.
  std::unique_ptr<Program> program(std::size_t first, std::size_t last,
                                   const std::vector<TensorArg>& inputs,
                                   const std::vector<TensorArg>& outputs,
                                   const std::vector<TensorArg>& constants,
                                   std::size_t alignment) const;

 private:
  std::vector<RecordedLaunch> launches_;
  std::vector<pybind11::object> kept_;
};

// Recorded launches whose intermediate tensors share one piece of memory, the arena, by lifetime.
// It holds no reference to tensors: its constants have to live as long.
class Program {
 public:
  struct Pointer {
    std::size_t access;  // its number among the launch's
    std::size_t base;    // the number of an input, behind them of an output, last of all the arena
    std::size_t distance;  // bytes from the base
  };

  struct Step {
    Kernel kernel;
    std::vector<std::byte> arguments;
    std::vector<Access> accesses;
    std::vector<Pointer> pointers;  // those that differ from run to run
  };

  std::size_t size() const { return steps_.size(); }
  std::size_t arena_bytes() const { return arena_bytes_; }
  // `tensors`: the addresses of all inputs, then of all outputs. Calls `after` behind each launch
  // with its number, if there is one.
  void run(std::vector<std::uintptr_t> tensors, std::uintptr_t arena, std::uintptr_t stream,
           const std::function<void(std::size_t)>& after = {}) const;

 private:
  friend class Recorder;

  std::vector<Step> steps_;
  std::vector<pybind11::object> functions_;  // of Python, which steps call
  std::size_t tensors_ = 0;
  std::size_t arena_bytes_ = 0;
};

// Collects a kernel's arguments and runs it. Not to be moved: it knows pointers by their place.
template <typename Arguments>
class Launch {
  static_assert(std::is_trivially_copyable_v<Arguments>);

 public:
  Launch() = default;
  Launch(const Launch&) = delete;

  Arguments arguments{};

  // Sets `slot`, a member of the arguments, to the tensor's memory. Throws ValueError for a null
  // pointer or one that is not aligned to the elements.
  template <typename T>
  void reads(const T*& slot, const char* name, const TensorArg& tensor) {
    slot = reinterpret_cast<const T*>(bind(&slot, name, tensor, false));
  }
  template <typename T>
  void writes(T*& slot, const char* name, const TensorArg& tensor) {
    slot = reinterpret_cast<T*>(bind(&slot, name, tensor, true));
  }

  // Says of a tensor that reads() took that the one that is written may have its memory: of the
  // same size and layout, each element is read by who writes that element, before it is written.
  template <typename T>
  void may_replace(const T* const& slot) {
    for (Access& access : accesses_) access.replaceable |= access.offset == offset_of(&slot);
  }

  // By kKernel(arguments), or arguments.call<kKernel>(stream) where they are more than the
  // kernel's.
  template <auto kKernel>
  void run(std::uintptr_t stream = 0) {
    const Kernel kernel = [](void* bytes, std::uintptr_t stream) {
      Arguments& taken = *static_cast<Arguments*>(bytes);
      if constexpr (std::is_invocable_v<decltype(kKernel), Arguments&>) {
        kKernel(taken);
      } else {
        taken.template call<kKernel>(stream);
      }
    };
    if (Recorder* const recorder = Recorder::active()) {
      const auto* const bytes = reinterpret_cast<const std::byte*>(&arguments);
      recorder->add({kernel, {bytes, bytes + sizeof arguments}, accesses_});
      for (PyObject* const tensor : tensors_) recorder->keep(tensor);
    }
    const pybind11::gil_scoped_release unlocked;
    run_kernel(kernel, &arguments, stream, accesses_);
  }

 private:
  std::size_t offset_of(const void* slot) const {
    return static_cast<const std::byte*>(slot) - reinterpret_cast<const std::byte*>(&arguments);
  }

  std::uintptr_t bind(const void* slot, const char* name, const TensorArg& tensor, bool written) {
    const std::uintptr_t address = tensor.address;
    if (address == 0 && tensor.numel() > 0) refuse(std::string(name) + " is a null pointer");
    if (address % static_cast<std::uintptr_t>(element_size(tensor.type)) != 0) {
      refuse(std::string(name) + " is not aligned to its elements");
    }
    accesses_.push_back({offset_of(slot), tensor.span(), written});
    tensors_.push_back(tensor.tensor);
    return address;
  }

  std::vector<Access> accesses_;
  std::vector<PyObject*> tensors_;
};

// Sets `slot` to the array, if there is one, which must have that type and those sizes and be
// contiguous. It is read if `slot` points to what is constant, else written.
template <typename Arguments, typename T>
void set_array(Launch<Arguments>& launch, T*& slot, const char* name,
               const std::optional<TensorArg>& tensor, ScalarType type,
               std::initializer_list<std::int64_t> sizes) {
  if (!tensor) return;
  check_array(name, *tensor, type, sizes);
  if constexpr (std::is_const_v<T>) {
    launch.reads(slot, name, *tensor);
  } else {
    launch.writes(slot, name, *tensor);
  }
}

void register_programs(pybind11::module_& module);
