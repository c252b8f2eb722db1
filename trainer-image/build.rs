//! Lets the trainer and its tests find libtorch where they were built; LD_LIBRARY_PATH, as in the image, comes first.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Ok(lib) = std::env::var("DEP_C10D_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    }
}
