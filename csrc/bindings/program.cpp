#include "program.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#ifdef RESNET_FUSED_HOST_SIM
#include "host_sim/simulator.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

thread_local Recorder* active_recorder = nullptr;
std::atomic<bool> kernels_stubbed{false};

std::size_t round_up(std::size_t bytes, std::size_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// An intermediate tensor, from the launch that first writes it to the last that uses it.
struct Intermediate {
  Span span;
  std::size_t first, last;
  std::size_t replaced;    // the number of one whose memory it may have, if that ends as it begins
  std::size_t offset = 0;  // in the arena
};

constexpr std::size_t kNone = -1;

// Gives each, in the order of their first launches, the place of the one that it replaces, or the
// lowest that none of those that live at the same time overlaps. Returns the bytes of all.
std::size_t place(std::vector<Intermediate>& intermediates, std::size_t alignment) {
  std::size_t total = 0;
  std::vector<const Intermediate*> living;  // by offset
  for (Intermediate& one : intermediates) {
    living.erase(std::remove_if(living.begin(), living.end(),
                                [&](const Intermediate* other) { return other->last < one.first; }),
                 living.end());
    if (one.replaced != kNone && intermediates[one.replaced].last == one.first) {
      const Intermediate& other = intermediates[one.replaced];
      one.offset = other.offset;
      *std::find(living.begin(), living.end(), &other) = &one;
      continue;
    }
    auto next = living.begin();
    for (; next != living.end() && one.offset + one.span.bytes() > (*next)->offset; ++next) {
      one.offset = round_up((*next)->offset + (*next)->span.bytes(), alignment);
    }
    living.insert(next, &one);
    total = std::max(total, one.offset + one.span.bytes());
  }
  return total;
}

// The number of the intermediate tensor whose memory a tensor that a launch writes may have.
std::size_t replaced_by(const Span& written, const std::vector<Access>& accesses,
                        const std::vector<Intermediate>& intermediates) {
  for (const Access& access : accesses) {
    if (!access.replaceable || access.span.bytes() != written.bytes()) continue;
    const auto uses_it_too = [&](const Access& other) {
      return &other != &access && other.span.overlaps(access.span);
    };
    if (std::any_of(accesses.begin(), accesses.end(), uses_it_too)) continue;
    for (std::size_t i = 0; i < intermediates.size(); ++i) {
      if (intermediates[i].span == access.span) return i;
    }
  }
  return kNone;
}

// A launch that Python makes; as many addresses follow.
struct Call {
  PyObject* function;
  std::size_t tensors;
};

void call_python(void* arguments, std::uintptr_t) {
  const py::gil_scoped_acquire locked;
  Call call;
  std::memcpy(&call, arguments, sizeof call);
  py::tuple addresses(call.tensors);
  for (std::size_t i = 0; i < call.tensors; ++i) {
    std::uintptr_t address;
    std::memcpy(&address, static_cast<std::byte*>(arguments) + sizeof call + i * sizeof address,
                sizeof address);
    addresses[i] = address == 0 ? py::object(py::none()) : py::object(py::int_(address));
  }
  py::reinterpret_borrow<py::object>(call.function)(*addresses);
}

Call call_of(const RecordedLaunch& launch) {
  Call call;
  std::memcpy(&call, launch.arguments.data(), sizeof call);
  return call;
}

}  // namespace

bool kernels_are_stubbed() { return kernels_stubbed; }

void run_kernel(Kernel kernel, void* arguments, std::uintptr_t stream,
                const std::vector<Access>& accesses) {
  if (kernels_are_stubbed()) return;
#ifdef RESNET_FUSED_HOST_SIM
  if (!std::exchange(buffers_given, false)) {
    host_sim::clear_buffers();
    for (const bool writing : {false, true}) {
      for (const Access& access : accesses) {
        if (access.written != writing) continue;
        host_sim::register_buffer(reinterpret_cast<const void*>(access.span.first),
                                  access.span.bytes(), writing);
      }
    }
  }
#else
  static_cast<void>(accesses);
#endif
  kernel(arguments, stream);
}

#ifdef RESNET_FUSED_HOST_SIM
bool buffers_given = false;
#endif

Recorder* Recorder::active() { return active_recorder; }

void Recorder::start() {
  if (active_recorder) throw std::runtime_error("another recorder is active in this thread");
  active_recorder = this;
}

void Recorder::stop() {
  if (active_recorder == this) active_recorder = nullptr;
}

void Recorder::add_call(const py::object& function,
                        const std::vector<std::optional<TensorArg>>& tensors) {
  RecordedLaunch launch{call_python, std::vector<std::byte>(sizeof(Call)), {}};
  const Call call{function.ptr(), tensors.size()};
  std::memcpy(launch.arguments.data(), &call, sizeof call);
  for (const std::optional<TensorArg>& tensor : tensors) {
    const std::size_t offset = launch.arguments.size();
    const std::uintptr_t address = tensor ? tensor->address : 0;
    launch.arguments.resize(offset + sizeof address);
    std::memcpy(launch.arguments.data() + offset, &address, sizeof address);
    if (!tensor) continue;
    launch.accesses.push_back({offset, tensor->span(), false, false, true});
    keep(tensor->tensor);
  }
  keep(function.ptr());
  add(std::move(launch));
}

std::unique_ptr<Program> Recorder::program(std::size_t first, std::size_t last,
                                           const std::vector<TensorArg>& inputs,
                                           const std::vector<TensorArg>& outputs,
                                           const std::vector<TensorArg>& constants,
                                           std::size_t alignment) const {
  if (first >= last || last > launches_.size()) return nullptr;
  std::vector<Span> in, out, fixed;
  for (const TensorArg& tensor : inputs) in.push_back(tensor.span());
  for (const TensorArg& tensor : outputs) out.push_back(tensor.span());
  for (const TensorArg& tensor : constants) fixed.push_back(tensor.span());
  std::vector<Span> named = in;
  named.insert(named.end(), out.begin(), out.end());
  for (std::size_t i = 0; i < named.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (named[i].overlaps(named[j])) return nullptr;
    }
  }
  const std::size_t arena = named.size();
  std::vector<bool> written_out(out.size());
  std::vector<Intermediate> intermediates;
  auto program = std::make_unique<Program>();
  program->tensors_ = named.size();
  std::vector<std::vector<std::size_t>> uses;  // of a step's pointers: the intermediate's number

  for (std::size_t i = first; i < last; ++i) {
    const RecordedLaunch& launch = launches_[i];
    Program::Step step{launch.kernel, launch.arguments, launch.accesses, {}};
    if (launch.kernel == call_python) {
      program->functions_.push_back(py::reinterpret_borrow<py::object>(call_of(launch).function));
    }
    std::vector<std::size_t> used;
    for (const bool writing : {false, true}) {
      for (std::size_t number = 0; number < launch.accesses.size(); ++number) {
        const Access& access = launch.accesses[number];
        const Span& span = access.span;
        const auto within = [&](const Span& whole) { return whole.contains(span); };
        const auto input = std::find_if(in.begin(), in.end(), within);
        const bool written = access.unknown ? input == in.end() : access.written;
        if (written != writing || span.bytes() == 0) continue;
        const auto output = std::find_if(out.begin(), out.end(), within);
        if (output != out.end()) {
          const std::size_t which = output - out.begin();
          if (writing && span == *output) written_out[which] = true;
          if (!written_out[which]) return nullptr;
          step.pointers.push_back({number, in.size() + which, span.first - output->first});
          used.push_back(kNone);
          continue;
        }
        if (!writing && input != in.end()) {
          step.pointers.push_back(
              {number, static_cast<std::size_t>(input - in.begin()), span.first - input->first});
          used.push_back(kNone);
          continue;
        }
        auto found = std::find_if(intermediates.begin(), intermediates.end(),
                                  [&](const Intermediate& one) { return within(one.span); });
        if (found == intermediates.end()) {
          if (!writing) {
            if (std::none_of(fixed.begin(), fixed.end(), within)) return nullptr;
            continue;
          }
          const auto meets = [&](const Span& other) { return span.overlaps(other); };
          if (std::any_of(named.begin(), named.end(), meets) ||
              std::any_of(fixed.begin(), fixed.end(), meets) ||
              std::any_of(intermediates.begin(), intermediates.end(),
                          [&](const Intermediate& one) { return meets(one.span); })) {
            return nullptr;
          }
          const std::size_t replaced = replaced_by(span, launch.accesses, intermediates);
          found = intermediates.insert(intermediates.end(), {span, i, i, replaced});
        }
        found->last = i;
        step.pointers.push_back({number, arena, span.first - found->span.first});
        used.push_back(found - intermediates.begin());
      }
    }
    program->steps_.push_back(std::move(step));
    uses.push_back(std::move(used));
  }
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (!written_out[i] && out[i].bytes() > 0) return nullptr;
  }
  program->arena_bytes_ = place(intermediates, alignment);
  for (std::size_t i = 0; i < uses.size(); ++i) {
    for (std::size_t j = 0; j < uses[i].size(); ++j) {
      if (uses[i][j] != kNone) {
        program->steps_[i].pointers[j].distance += intermediates[uses[i][j]].offset;
      }
    }
  }
  return program;
}

void Program::run(std::vector<std::uintptr_t> bases, std::uintptr_t arena, std::uintptr_t stream,
                  const std::function<void(std::size_t)>& after) const {
  if (bases.size() != tensors_) {
    throw std::invalid_argument("the program takes " + std::to_string(tensors_) +
                                " addresses, found " + std::to_string(bases.size()));
  }
  bases.push_back(arena);
  std::vector<std::byte> arguments;
  std::vector<Access> accesses;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    arguments = step.arguments;
    accesses = step.accesses;
    for (const Pointer& pointer : step.pointers) {
      const std::uintptr_t address = bases[pointer.base] + pointer.distance;
      Access& access = accesses[pointer.access];
      access.span = {address, address + access.span.bytes()};
      std::memcpy(arguments.data() + access.offset, &address, sizeof address);
    }
    run_kernel(step.kernel, arguments.data(), stream, accesses);
    if (after) after(i);
  }
}

void register_programs(py::module_& module) {
  py::class_<Program>(module, "Program", py::module_local(),
                      "Recorded launches, to be run again on other memory.")
      .def("__len__", &Program::size)
      .def_property_readonly("arena_bytes", &Program::arena_bytes)
      .def(
          "run",
          [](const Program& program, std::vector<std::uintptr_t> tensors, std::uintptr_t arena,
             std::uintptr_t stream) { program.run(std::move(tensors), arena, stream); },
          "tensors"_a, "arena"_a, "stream"_a = 0, py::call_guard<py::gil_scoped_release>(),
          "Runs every launch, on `stream`. Addresses of all inputs and then of all outputs, of "
          "the\n"
          "sizes, strides and types that were recorded, and of arena_bytes bytes, aligned as was\n"
          "asked for; nothing else may use the outputs and the arena meanwhile.");

  py::class_<Recorder>(module, "Recorder", py::module_local(),
                       "Keeps the launches of the thread that starts it, until it is stopped.")
      .def(py::init())
      .def("start", &Recorder::start)
      .def("stop", &Recorder::stop)
      .def("__len__", &Recorder::size)
      .def("add_call", &Recorder::add_call, "function"_a, "tensors"_a,
           "Adds a launch by function(address, ...) of the tensors, None for None. Which of them\n"
           "it writes is not told: all but a program's inputs count as written.")
      .def("program", &Recorder::program, "first"_a, "last"_a, "inputs"_a, "outputs"_a,
           "constants"_a, "alignment"_a,
           "Launches `first` to before `last` as a Program from inputs to outputs, none of which\n"
           "overlap. It keeps no tensor alive: `constants`, all else that they may read, have to\n"
           "stay where they are. None where they read anything else or leave part of an output\n"
           "unwritten.");

  module.def(
      "stub_kernels", [](bool stubbed) { kernels_stubbed = stubbed; }, "stubbed"_a,
      "While True, kernels of this module are called for but do not run, in every thread: what\n"
      "remains is the host's time.");
}
