// The only file that knows Python. Tensors come as addresses: no libtorch, so one wheel serves every torch.
#include <pybind11/pybind11.h>

#include <string>

#include "arena.h"
#include "mark_converged.h"
#include "newton_rows.h"
#include "ops.h"
#include "parallel.h"

#ifndef DEQDIFF_VERSION
#define DEQDIFF_VERSION "unknown"
#endif

namespace py = pybind11;
using namespace deqdiff;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["isa"] = isa_table().name;
  info["version"] = DEQDIFF_VERSION;
  info["block"] = kBlock;
  info["max_history"] = kMaxHistory;
  info["max_lags"] = kMaxLags;
  info["worker_threads"] = worker_count();
  info["tiny"] = kTiny;
  info["min_rate"] = kMinRate;
  info["max_rate"] = kMaxRate;
  info["first_rate"] = kFirstRate;
  return info;
}

Arguments read(const py::kwargs& given) {
  Arguments arguments(given.size());
  for (const auto& [key, value] : given) {
    const char* name = PyUnicode_AsUTF8(key.ptr());
    if (name == nullptr) throw py::error_already_set();
    if (PyFloat_Check(value.ptr())) {
      arguments.add(name, PyFloat_AS_DOUBLE(value.ptr()));
    } else {
      const long long integer = PyLong_AsLongLong(value.ptr());
      if (integer == -1 && PyErr_Occurred() != nullptr) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError) == 0) throw py::error_already_set();
        PyErr_Clear();
        throw py::value_error(std::string(name) + ": expected an integer of 64 bits");
      }
      arguments.add(name, static_cast<std::int64_t>(integer));
    }
  }
  return arguments;
}

void define_op(py::module_& m, const char* name, void (*call)(Arguments&)) {
  const std::string doc =
      std::string("In place, on addresses; see deqdiff_fast.kernels.") + name + ". Releases the GIL.";
  m.def(
      name,
      [call](const py::kwargs& given) {
        Arguments arguments = read(given);
        const py::gil_scoped_release unlocked;
        call(arguments);
      },
      doc.c_str());
}

py::dict stats_py(const Arena& arena) {
  const ArenaStats stats = arena.stats();
  py::dict result;
  result["bytes"] = stats.bytes;
  result["idle_bytes"] = stats.idle_bytes;
  result["high_water"] = stats.high_water;
  result["leases"] = stats.leases;
  result["reuses"] = stats.reuses;
  result["active"] = stats.active;
  return result;
}

py::buffer_info lease_buffer(Lease& lease) {
  return py::buffer_info(lease.view(), 1, py::format_descriptor<unsigned char>::format(),
                         static_cast<py::ssize_t>(lease.bytes()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of deqdiff_fast: solver memory and CPU kernels. Use it through deqdiff_fast.kernels and .memory.";
  m.attr("__version__") = DEQDIFF_VERSION;
  m.def("build_info", &build_info, "Compiler, instruction set chosen at run time, version and limits.");
  using py::arg;
#define DEQDIFF_DEFINE(name) define_op(m, #name, &name##_call);
  DEQDIFF_OPS(DEQDIFF_DEFINE)
#undef DEQDIFF_DEFINE

  py::class_<Lease, std::shared_ptr<Lease>>(m, "Lease", py::buffer_protocol(),
                                            "Exclusive use of one slab of 256-byte aligned host memory.")
      .def_buffer(&lease_buffer)
      .def("release", &Lease::release, "Give the slab back. It is reused once no view of it is left. Idempotent.")
      .def_property_readonly("released", &Lease::released)
      .def_property_readonly("generation", &Lease::generation)
      .def_property_readonly("nbytes", &Lease::bytes);

  py::class_<Arena>(m, "Arena", "Slabs of host memory, reused between solves; idle ones above the budget are freed.")
      .def(py::init<std::size_t>(), arg("byte_budget"))
      // With the GIL, like all that takes an arena's mutex: no other thread can then hold one while a process forks.
      .def("lease", &Arena::lease, arg("total_bytes"))
      .def("stats", &stats_py)
      .def("set_poison", &Arena::set_poison, arg("on"), "Fill slabs with NaN (0xFF bytes) on lease and on release.")
      .def("trim", &Arena::trim, "Free every idle slab.");
}
