//! Owns one question: whether `./x setup` has compiled RocksDB's fault-injecting environment. Where it
//! has, the tests that cut the power under RocksDB are built; elsewhere everything else is.

fn main() {
    println!("cargo:rustc-check-cfg=cfg(fault_env)");
    println!("cargo:rerun-if-env-changed=CORACLE_FAULT_ENV_DIR");
    let Some(dir) = std::env::var_os("CORACLE_FAULT_ENV_DIR") else { return };
    println!("cargo:rustc-cfg=fault_env");
    println!("cargo:rustc-link-search=native={}", dir.display());
    println!("cargo:rustc-link-lib=static=coracle_fault_env");
}
