//! Owns the reading of a node's `/metrics`, as far as a comparison needs it: sums over series, and the
//! processor time of a process. Knows the text form, and no metric by name.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::failure::Failure;

/// A node that takes longer is not well.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A page is a few dozen kilobytes.
const PAGE_BYTES_MAX: u64 = 16 << 20;

/// What the kernel counts processor time in, on every architecture, whatever its own clock does.
const TICKS_PER_SECOND: f64 = 100.0;

/// The values of a page, by series: `name{label="value"}`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page(BTreeMap<String, f64>);

impl Page {
    /// Reads the page of a node.
    pub async fn read(http: SocketAddr) -> Result<Page, Failure> {
        let page = tokio::time::timeout(TIMEOUT, get(http)).await;
        let page = page.map_err(Failure::of(format!("read the metrics of {http}")))?;
        let page = page.map_err(Failure::of(format!("read the metrics of {http}")))?;
        match page.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(Page::parse(body)),
            _ => Err(Failure::new(format!("{http} does not serve metrics"))),
        }
    }

    fn parse(text: &str) -> Page {
        let line = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            Some((series.to_owned(), value.parse().ok()?))
        };
        Page(text.lines().filter(|line| !line.starts_with('#')).filter_map(line).collect())
    }

    /// The sum of all series of that name, or of the one series of that name with its labels.
    pub fn sum(&self, name: &str) -> f64 {
        let is_meant = |series: &str| {
            let rest = series.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        };
        self.0.iter().filter(|(series, _)| is_meant(series)).map(|(_, value)| value).sum()
    }

    /// What was added since an earlier page. Several nodes' pages can be added to one.
    pub fn since(&self, earlier: &Page) -> Page {
        let added = |(series, value): (&String, &f64)| {
            (series.clone(), value - earlier.0.get(series).copied().unwrap_or(0.0))
        };
        Page(self.0.iter().map(added).collect())
    }

    /// Adds another node's page to this one.
    pub fn add(&mut self, other: &Page) {
        for (series, value) in &other.0 {
            *self.0.entry(series.clone()).or_default() += value;
        }
    }
}

async fn get(http: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(http).await?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut page = String::new();
    stream.take(PAGE_BYTES_MAX).read_to_string(&mut page).await?;
    Ok(page)
}

/// Processor time that a process, or this one (`None`), has used so far. 0 once it has ended.
pub fn processor_time(process: Option<u32>) -> Duration {
    let who = process.map_or("self".to_owned(), |id| id.to_string());
    let stat = fs::read_to_string(format!("/proc/{who}/stat")).unwrap_or_default();
    Duration::from_secs_f64(ticks(&stat) / TICKS_PER_SECOND)
}

/// User and system time; the name before them may hold anything, also spaces and brackets.
fn ticks(stat: &str) -> f64 {
    let behind_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields = behind_name.split_whitespace().skip(11).take(2);
    fields.filter_map(|field| field.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_summed_and_compared() {
        let earlier = Page::parse(
            "# HELP x X\nx_count{stage=\"a b\"} 1\nx_count{stage=\"b\"} 2\ny 0.5\n# EOF\n",
        );
        let later =
            Page::parse("x_count{stage=\"a b\"} 5\nx_count{stage=\"b\"} 2\ny 0.75\nx_counter 9\n");
        assert_eq!((earlier.sum("x_count"), later.sum("x_count")), (3.0, 7.0));
        assert_eq!(later.sum("x_count{stage=\"a b\"}"), 5.0);
        assert_eq!(later.sum("nothing"), 0.0);
        let mut added = later.since(&earlier);
        assert_eq!(
            (added.sum("x_count"), added.sum("y"), added.sum("x_counter")),
            (4.0, 0.25, 9.0)
        );
        added.add(&earlier);
        assert_eq!(added.sum("x_count"), 7.0);
    }

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a ) b (c) S 1 2 3 4 5 6 7 8 9 10 250 50 1 1";
        assert_eq!(ticks(stat), 300.0);
        assert_eq!(ticks(""), 0.0);
        let before = processor_time(None);
        let mut number = 1_u64;
        while processor_time(None) == before {
            number = std::hint::black_box(number.wrapping_mul(3));
        }
        assert_eq!(processor_time(Some(u32::MAX)), Duration::ZERO);
    }
}
