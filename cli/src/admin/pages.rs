//! `coracle completion` and `coracle man`: made from the same definition as the parser.

use std::path::Path;

use clap_complete::Shell;

use crate::args::command;
use crate::failure::Failure;
use crate::output::Output;

/// Prints a completion script.
pub fn completion(shell: Shell, output: &Output) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "coracle", &mut script);
    output.data(&script)
}

/// Prints the manual's first page, or writes all of them.
pub fn man(dir: Option<&Path>, output: &Output) -> Result<(), Failure> {
    if let Some(dir) = dir {
        let written =
            std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(command(), dir));
        written.map_err(|error| Failure::io("write the pages to", dir, &error))?;
        return output.line(&format!("pages written: man {}/coracle.1", dir.display()));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command())
        .render(&mut page)
        .map_err(|error| Failure::failed(format!("cannot make the page: {error}")))?;
    output.data(&page)
}
