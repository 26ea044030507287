//! Owns comparing what is generated with what is checked in. With `CORACLE_REGENERATE=1` it writes
//! instead.

use std::path::Path;
use std::{env, fs};

/// `path` is from the root of the checkout.
#[track_caller]
pub(crate) fn expect_generated(path: &Path, wanted: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a folder of the workspace");
    let full = root.join(path);
    let found = fs::read_to_string(&full).unwrap_or_default();
    if found != wanted && env::var("CORACLE_REGENERATE").is_ok_and(|value| value == "1") {
        fs::write(&full, wanted).expect("the checkout is writable");
        return;
    }
    assert!(found == wanted, "{} is not what the code says: run ./x fix", path.display());
}
