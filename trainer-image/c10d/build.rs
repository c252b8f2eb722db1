//! Compiles the C++ shim against the libtorch in `LIBTORCH`, and its NCCL half where `CUDA_HEADERS` has what it needs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

const TORCH_VERSION: &str = "2.11.0";

fn main() -> ExitCode {
    for path in ["shim", "build.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for name in ["LIBTORCH", "CUDA_HEADERS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let libtorch = libtorch()?;
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?);
    compiler(&libtorch)
        .flag("-fvisibility=hidden")
        .file("shim/shim.cpp")
        .try_compile("c10d_shim")
        .map_err(|e| format!("shim/shim.cpp does not compile against {}: {e}", libtorch.display()))?;
    build_cuda(&libtorch, &out.join("c10d_cuda.so"))?;

    let lib = libtorch.join("lib");
    println!("cargo::rustc-link-search=native={}", lib.display());
    for name in ["torch_cpu", "c10"] {
        println!("cargo::rustc-link-lib={name}");
    }
    // Tests of this crate find libtorch without LD_LIBRARY_PATH. A link argument does not reach dependent crates: their
    // build scripts read DEP_C10D_LIB and say the same.
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo::metadata=lib={}", lib.display());
    Ok(())
}

/// The libtorch folder, checked.
fn libtorch() -> Result<PathBuf, String> {
    let fetch = "run `trainer-image/libtorch.sh`, which fetches it to where .cargo/config.toml expects it";
    let Some(path) = env::var_os("LIBTORCH").map(PathBuf::from) else {
        return Err(format!("LIBTORCH is not set (the folder of libtorch {TORCH_VERSION}); {fetch}"));
    };
    for file in ["lib/libtorch_cpu.so", "lib/libc10.so", "include/torch/csrc/distributed/c10d/TCPStore.hpp"] {
        if !path.join(file).exists() {
            return Err(format!("no libtorch in LIBTORCH={} ({file} is missing); {fetch}", path.display()));
        }
    }
    let header = path.join("include/torch/headeronly/version.h");
    let version = fs::read_to_string(&header).map_err(|e| format!("{}: {e}; {fetch}", header.display()))?;
    if version.contains(&format!("\"{TORCH_VERSION}\"")) {
        Ok(path)
    } else {
        Err(format!("LIBTORCH={} is not libtorch {TORCH_VERSION}; {fetch}", path.display()))
    }
}

fn compiler(libtorch: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    // -O1: the shim only forwards calls; higher levels double the time that libtorch's headers take.
    build.cpp(true).pic(true).std("c++17").opt_level(1).define("_GLIBCXX_USE_CXX11_ABI", "1").include("shim");
    // As system headers: their warnings are not ours to mend.
    for path in ["include", "include/torch/csrc/api/include"] {
        build.flag("-isystem").flag(libtorch.join(path));
    }
    build.flag("-isystem").flag("shim/stub");
    build
}

/// Compiles the NCCL half into `target`, or leaves that file empty where the headers are not there.
fn build_cuda(libtorch: &Path, target: &Path) -> Result<(), String> {
    println!("cargo::rustc-env=C10D_CUDA_SHIM={}", target.display());
    let headers = env::var_os("CUDA_HEADERS").map(PathBuf::from).filter(|path| path.exists());
    if let Some(path) = &headers {
        // The headers may come later. (A path that is not there would rebuild this crate every time.)
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let Some(headers) = headers.filter(|path| path.join("nccl/include/nccl.h").exists()) else {
        return fs::write(target, b"").map_err(|e| format!("{}: {e}", target.display()));
    };
    let mut build = compiler(libtorch);
    build.flag("-isystem").flag("shim/stubcuda");
    for path in ["cu13/include", "cu13/include/cccl", "nccl/include"] {
        build.flag("-isystem").flag(headers.join(path));
    }
    let mut command = build.get_compiler().to_command();
    command.args(["-shared", "-o"]).arg(target).arg("shim/shim_cuda.cpp");
    let status = command.status().map_err(|e| format!("C++ compiler: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("shim/shim_cuda.cpp does not compile with the headers in CUDA_HEADERS={}", headers.display()))
    }
}
