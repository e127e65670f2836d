//! Says whether the bundled model is there to be embedded.

fn main() {
    let model = "../models/photo-x4.latile";
    println!("cargo::rerun-if-changed={model}");
    println!("cargo::rustc-check-cfg=cfg(latile_bundled)");
    if std::env::var_os("CARGO_FEATURE_BUNDLED").is_some() {
        if std::path::Path::new(model).exists() {
            println!("cargo::rustc-cfg=latile_bundled");
        } else {
            println!("cargo::warning={model} is missing: the program will ask for --model");
        }
    }
}
