//! Draws operations on one key over time, as a page that any browser shows. Owns the drawing; what to
//! draw, and why, comes from the judges.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::history::{Action, Answer, Operation, Outcome, Seen};

/// Pixels from one begin or end to the next: what happened at once is told apart by order, not by time.
const STEP: usize = 90;
const ROW: usize = 46;
const LEFT: usize = 90;
const TOP: usize = 30;

const STYLE: &str = "body{font:14px system-ui,sans-serif;margin:2em}svg{font:12px ui-monospace,monospace}\
    .ok{fill:#cfe8cf}.unknown{fill:#f3e3b5}.fail{fill:#ddd}.culprit{fill:#f2b3b3;stroke:#a00}\
    .lane{stroke:#ccc}";

/// A page with the operations, one row for each client; the one that cannot be explained stands out.
pub fn page(title: &str, why: &str, operations: &[Operation], culprit: Option<u64>) -> String {
    // Only the order of begins and ends is drawn.
    let places = operations.iter().flat_map(|one| [one.begin, one.end]);
    let mut places: Vec<usize> = places.filter(|place| *place != usize::MAX).collect();
    places.sort_unstable();
    places.dedup();
    let column = |place: usize| places.partition_point(|known| *known < place);
    let mut clients: BTreeMap<u32, usize> = BTreeMap::new();
    for one in operations {
        let row = clients.len();
        clients.entry(one.client).or_insert(row);
    }
    let (wide, high) = (LEFT + (places.len() + 1) * STEP, TOP + (clients.len() + 1) * ROW);
    let mut page = format!(
        "<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\
         <h1>{title}</h1><p>{why}</p>\
         <p>From left to right: begins and ends in their order, not to scale. Green was answered, yellow \
         may still happen, grey did not happen, red has no explanation.</p>\
         <svg width={wide} height={high}>\n",
        title = escape(title),
        why = escape(why),
    );
    for (client, row) in &clients {
        let y = TOP + row * ROW;
        line(&mut page, format_args!("<text x=4 y={}>client {client}</text>", y + 18));
        let y = y + ROW - 8;
        line(&mut page, format_args!("<line class=lane x1={LEFT} x2={wide} y1={y} y2={y} />"));
    }
    for one in operations {
        let from = column(one.begin);
        let to = if one.end == usize::MAX { places.len() } else { column(one.end) };
        let (x, y) = (LEFT + from * STEP, TOP + clients[&one.client] * ROW);
        let width = (to.max(from + 1) - from) * STEP - 6;
        let class = match (&one.outcome, culprit == Some(one.call)) {
            (_, true) => "culprit",
            (Outcome::Ok(_), _) => "ok",
            (Outcome::Unknown, _) => "unknown",
            (Outcome::Fail, _) => "fail",
        };
        let text = escape(&label(one));
        line(
            &mut page,
            format_args!(
                "<g><title>call {}: {text}, from {} us</title><rect class={class} x={x} y={y} width={width} \
             height=28 rx=4 /><text x={} y={}>{text}</text></g>",
                one.call,
                one.begin_us,
                x + 6,
                y + 18,
            ),
        );
    }
    page.push_str("</svg>\n");
    page
}

fn line(page: &mut String, what: std::fmt::Arguments<'_>) {
    writeln!(page, "{what}").expect("a String takes all");
}

/// An operation and its answer, in a few words.
pub fn label(one: &Operation) -> String {
    let action = match &one.action {
        Action::Get => "get".to_owned(),
        Action::ReplicaGet => "get from a replica".to_owned(),
        Action::SessionGet => "session get".to_owned(),
        Action::BoundedGet { ms } => format!("get within {ms} ms"),
        Action::GetAt { version } => format!("get at {version}"),
        Action::Put { value } => format!("put {}", short(value)),
        Action::PutIfAbsent { value } => format!("put if absent {}", short(value)),
        Action::PutIfVersion { value, version } => format!("put if {version} {}", short(value)),
        Action::Delete => "delete".to_owned(),
        Action::DeleteRange => "delete range".to_owned(),
    };
    let seen = |seen: &Option<Seen>| match seen {
        Some(seen) => format!("{} at {}", short(&seen.value), seen.version),
        None => "absent".to_owned(),
    };
    let answer = match &one.outcome {
        Outcome::Ok(Answer::Read { seen: what, .. }) => seen(what),
        Outcome::Ok(Answer::Written { version, .. }) => format!("at {version}"),
        Outcome::Ok(Answer::Mismatch { seen: what, .. }) => format!("refused: {}", seen(what)),
        Outcome::Fail => "failed".to_owned(),
        Outcome::Unknown => "?".to_owned(),
    };
    format!("{action} → {answer}")
}

/// Values are padded to some length: their beginning tells them apart.
fn short(value: &str) -> &str {
    let end = value.char_indices().nth(12).map_or(value.len(), |(at, _)| at);
    &value[..end]
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
