//! Judges a history that stands in a file. Owns what is printed of it, and the page that shows what is
//! wrong. The judges are in `checker`.

use std::fs::File;
use std::io::{BufReader, Error, ErrorKind};
use std::path::Path;

use crate::checker::{search, shrink, witness};
use crate::history::{History, Operation};
use crate::timeline;

/// Violations that are printed; how many there are is printed too.
const SHOWN_MAX: usize = 20;

/// Reads a history and tells what it breaks; false when it breaks anything. The first key without an
/// explanation is drawn in `html`.
pub fn check(path: &Path, html: Option<&Path>) -> Result<bool, String> {
    let failed = |error: Error| match error.kind() {
        ErrorKind::InvalidData => format!("{}: no history: {error}", path.display()),
        _ => format!("{}: {error}", path.display()),
    };
    let file = File::open(path).map_err(failed)?;
    let history = History::read(&mut BufReader::new(file)).map_err(failed)?;
    let operations = history.operations();
    let by_order = witness::check(&history);
    println!("{} operations, judged by the order that the servers say:", operations.len());
    tell(by_order.iter());
    let unexplained = search::check(&history);
    println!("judged by searching for an order:");
    tell(unexplained.iter());
    if let (Some(first), Some(out)) = (unexplained.first(), html) {
        let mut of_key = operations;
        of_key.retain(|one| one.key == first.key);
        draw(first, &of_key, out)?;
    }
    Ok(by_order.is_empty() && unexplained.is_empty())
}

fn tell(found: impl ExactSizeIterator<Item: std::fmt::Display>) {
    let count = found.len();
    if count == 0 {
        println!("  nothing is wrong");
    }
    found.take(SHOWN_MAX).for_each(|one| println!("  {one}"));
    if count > SHOWN_MAX {
        println!("  and {} more", count - SHOWN_MAX);
    }
}

fn draw(found: &search::Unexplained, operations: &[Operation], out: &Path) -> Result<(), String> {
    let small = match found.call {
        Some(_) => shrink::shrink(operations),
        None => operations.to_vec(),
    };
    let culprit = search::check_key(found.key.clone(), &small).and_then(|found| found.call);
    let page = timeline::page(&format!("key {}", found.key), &found.to_string(), &small, culprit);
    std::fs::write(out, page).map_err(|error| format!("{}: {error}", out.display()))?;
    println!("{} operations that have no explanation are drawn in {}", small.len(), out.display());
    Ok(())
}
