//! Owns the display of progress on standard error: one line that is redrawn on a terminal, else a
//! line every few seconds. Does not know what progresses.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// On a terminal: smooth to the eye, cheap.
const REDRAW: Duration = Duration::from_millis(200);

/// Elsewhere, logs mostly: enough to see that it goes on.
const LINE: Duration = Duration::from_secs(5);

/// How far a long piece of work is. Erases itself when it is dropped.
pub struct Progress {
    terminal: bool,
    last: Instant,
    drawn: bool,
}

impl Progress {
    pub(super) fn new(terminal: bool) -> Progress {
        Progress { terminal, last: Instant::now(), drawn: false }
    }

    /// Shows the text if it is time to.
    pub fn update(&mut self, text: impl FnOnce() -> String) {
        let interval = if self.terminal { REDRAW } else { LINE };
        if self.last.elapsed() < interval {
            return;
        }
        self.last = Instant::now();
        let mut stderr = io::stderr().lock();
        // Nobody can be told that standard error is gone.
        let _ = match self.terminal {
            true => write!(stderr, "\r\x1b[K{}", text()).and_then(|()| stderr.flush()),
            false => writeln!(stderr, "{}", text()),
        };
        self.drawn = true;
    }

    /// Makes room for a line of text above.
    pub fn clear(&mut self) {
        if self.terminal && self.drawn {
            let mut stderr = io::stderr().lock();
            let _ = write!(stderr, "\r\x1b[K").and_then(|()| stderr.flush());
            self.drawn = false;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
