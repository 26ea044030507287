//! Owns how a demo looks: lines with the time since its start, and one line of figures that is redrawn
//! on a terminal. Formats; `output` prints. Reads the commands that people type.

use std::io::BufRead;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use coracle_client::NodeId;
use tokio::sync::mpsc;

use crate::args::parse_node;
use crate::output::{Output, Progress, count, latency};

use super::load::Window;

/// What can be typed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// SIGKILL, by default to the node that leads the busiest shard.
    Kill(Option<NodeId>),
    /// Start again, by default every node that was killed.
    Restart(Option<NodeId>),
    /// Cut off from all others, by default the node that leads the busiest shard.
    Partition(Option<NodeId>),
    /// End every partition.
    Heal,
    /// How the cluster is.
    Status,
    /// What can be typed.
    Help,
    /// End.
    Quit,
}

/// The keys, for people.
pub const HELP: &str = "\
k  kill -9 the node that leads the busiest shard   :kill n3
r  restart what was killed                         :restart n3
p  cut that node off from all others               :partition n3
h  heal every partition                            :heal
s  how the cluster is                              :status
q  quit                                            (each followed by Enter)";

impl Command {
    /// Reads one line; `None` for an empty one.
    pub fn parse(line: &str) -> Result<Option<Command>, String> {
        let mut words = line.split_whitespace();
        let Some(word) = words.next() else {
            return Ok(None);
        };
        let node = words.next().map(parse_node).transpose()?;
        let command = match word.strip_prefix(':').unwrap_or(word) {
            "k" | "kill" => Command::Kill(node),
            "r" | "restart" => Command::Restart(node),
            "p" | "partition" => Command::Partition(node),
            "h" | "heal" => Command::Heal,
            "s" | "status" => Command::Status,
            "?" | "help" => Command::Help,
            "q" | "quit" => Command::Quit,
            other => return Err(format!("{other:?}? Known are:\n{HELP}")),
        };
        Ok(Some(command))
    }
}

/// Lines of standard input, until it ends.
pub fn typed() -> mpsc::Receiver<String> {
    let (tx, rx) = mpsc::channel(16);
    // Detached: a read of a terminal cannot be ended, and the process does not wait for it.
    let reading = std::thread::Builder::new().name("keys".to_owned()).spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if tx.blocking_send(line).is_err() {
                return;
            }
        }
    });
    // Without the thread nothing is typed; Ctrl-C still ends the demo.
    drop(reading);
    rx
}

/// The screen of a demo.
pub struct Screen<'a> {
    output: &'a Output,
    started: Instant,
    figures: Mutex<Progress>,
    plain: bool,
}

impl<'a> Screen<'a> {
    /// Its clock starts now.
    pub fn new(output: &'a Output, plain: bool) -> Screen<'a> {
        let figures = Mutex::new(output.progress());
        Screen { output, started: Instant::now(), figures, plain: plain || !output.is_terminal() }
    }

    /// A line without the time.
    pub fn line(&self, text: &str) {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner).clear();
        // When nobody reads any more, the demo still ends in order.
        let _ = self.output.line(text).and_then(|()| self.output.flush());
    }

    /// Something happened.
    pub fn event(&self, text: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.line(&format!("  {seconds:6.1} s  {text}"));
    }

    /// Says what comes next, in a script.
    pub fn caption(&self, text: &str) {
        let text = match self.plain {
            true => format!("== {text}"),
            false => self.output.paint(&format!("== {text}"), "1"),
        };
        self.line("");
        self.line(&text);
    }

    /// Shows the figures, if it is time to. Takes the window only then.
    pub fn figures(&self, take: impl FnOnce() -> Window) {
        let mut figures = self.figures.lock().unwrap_or_else(PoisonError::into_inner);
        figures.update(|| figures_line(&take()));
    }
}

/// A window in one line.
pub fn figures_line(window: &Window) -> String {
    let mut line = format!(
        "  load {} op/s   ok {:.2} %   p50 {}   p99 {}",
        count(window.rate().round() as u64),
        window.success(),
        latency(window.quantile(0.5)),
        latency(window.quantile(0.99)),
    );
    if window.lost > 0 {
        line.push_str(&format!("   LOST {}", window.lost));
    }
    if let Some(failure) = &window.last_failure {
        line.push_str(&format!("   last failure: {failure}"));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_words() {
        assert_eq!(Command::parse("k"), Ok(Some(Command::Kill(None))));
        assert_eq!(Command::parse(" :kill n3 "), Ok(Some(Command::Kill(Some(NodeId(3))))));
        assert_eq!(Command::parse(":restart 2"), Ok(Some(Command::Restart(Some(NodeId(2))))));
        assert_eq!(Command::parse("p"), Ok(Some(Command::Partition(None))));
        assert_eq!(Command::parse(":heal"), Ok(Some(Command::Heal)));
        assert_eq!(Command::parse("q"), Ok(Some(Command::Quit)));
        assert_eq!(Command::parse("  "), Ok(None));
        assert!(Command::parse("x").unwrap_err().contains("restart"));
        assert!(Command::parse(":kill nine").is_err());
    }
}
