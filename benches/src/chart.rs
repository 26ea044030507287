//! Owns pictures: lines over an axis, and bars, as SVG that any browser and GitHub show. Knows no
//! measurement.

use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;

/// Told apart on white and on black, also by most who see few colours.
const COLOURS: [&str; 6] = ["#3b75af", "#d9832c", "#519e3e", "#c53a32", "#8d69b8", "#84584e"];

/// Lines over an axis with a logarithmic scale.
#[derive(Clone, Debug)]
pub struct Lines {
    /// Above the picture.
    pub title: String,
    /// Below it.
    pub across: String,
    /// Beside it.
    pub up: String,
    /// Whether the upward scale is logarithmic as well.
    pub is_log: bool,
    /// Names, and points that rise in the first number.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

/// Groups of bars from left to right.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Above the picture.
    pub title: String,
    /// Beside it.
    pub up: String,
    /// What each bar of a group stands for.
    pub names: Vec<String>,
    /// Names below, and the bars' heights; `None` leaves a gap.
    pub groups: Vec<(String, Vec<Option<f64>>)>,
}

/// From a value to a place on the picture.
#[derive(Clone, Copy)]
struct Scale {
    is_log: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn new(is_log: bool, values: impl Iterator<Item = f64>, from: f64, to: f64) -> Scale {
        let values: Vec<f64> = values.filter(|value| !is_log || *value > 0.0).collect();
        let high = values.iter().copied().fold(f64::MIN, f64::max);
        let low = values.iter().copied().fold(f64::MAX, f64::min);
        let (low, high) = match (values.is_empty(), is_log) {
            (true, _) => (1.0, 10.0),
            (false, true) if high > low => (low, high),
            (false, true) => (low / 2.0, high * 2.0),
            (false, false) => (0.0, if high > 0.0 { high * 1.05 } else { 1.0 }),
        };
        Scale { is_log, low, high, from, to }
    }

    fn place(self, value: f64) -> f64 {
        let (value, low, high) = match self.is_log {
            true => (value.max(self.low).ln(), self.low.ln(), self.high.ln()),
            false => (value, self.low, self.high),
        };
        self.from + (value - low) / (high - low) * (self.to - self.from)
    }

    fn ticks(self) -> Vec<f64> {
        if self.is_log {
            let steps = [1.0, 2.0, 5.0];
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let wide = self.high / self.low > 1_000.0;
            let all = decades.flat_map(|decade| steps.map(|step| step * 10_f64.powi(decade)));
            let fits = |tick: &f64| (self.low * 0.999..=self.high * 1.001).contains(tick);
            let is_decade = |tick: &f64| (tick.log10() - tick.log10().round()).abs() < 1e-9;
            return all.filter(fits).filter(|tick| !wide || is_decade(tick)).collect();
        }
        let rough = (self.high - self.low) / 5.0;
        let decade = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * decade);
        let step = step.into_iter().find(|step| *step >= rough).unwrap_or(rough);
        (0..=(self.high / step) as u32).map(|tick| f64::from(tick) * step).collect()
    }
}

/// A number for people: 1.5 k, 20 M.
pub fn short(value: f64) -> String {
    let (value, unit) = match value.abs() {
        large if large >= 1e6 => (value / 1e6, " M"),
        large if large >= 1e3 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = match value.abs() {
        large if large >= 100.0 || large.fract() == 0.0 => 0,
        large if large >= 1.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}{unit}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

struct Picture(String);

impl Picture {
    fn new(title: &str, up: &str) -> Picture {
        let mut picture = Picture(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\" fill=\"#777\">\n"
        ));
        picture.text(LEFT, 18.0, "start", "font-size=\"14\" font-weight=\"bold\"", title);
        let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
        let turned = format!("transform=\"rotate(-90 14 {middle})\"");
        picture.text(14.0, middle, "middle", &turned, up);
        picture
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, more: &str, text: &str) {
        let text = escape(text);
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {more}>{text}</text>"
        );
    }

    fn up_axis(&mut self, scale: Scale) {
        for tick in scale.ticks() {
            let y = scale.place(tick);
            let right = WIDTH - RIGHT;
            let _ = writeln!(
                self.0,
                "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#999\" stroke-opacity=\"0.35\"/>"
            );
            self.text(LEFT - 6.0, y + 4.0, "end", "", &short(tick));
        }
    }

    fn legend<'a>(&mut self, names: impl Iterator<Item = &'a String>) {
        for (at, name) in names.enumerate() {
            let (x, y) = (WIDTH - RIGHT + 12.0, TOP + 8.0 + 18.0 * at as f64);
            let colour = COLOURS[at % COLOURS.len()];
            let _ = writeln!(
                self.0,
                "<rect x=\"{x}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>",
                y - 9.0
            );
            self.text(x + 15.0, y, "start", "", name);
        }
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

impl Lines {
    /// The picture.
    pub fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let across =
            Scale::new(true, points().map(|point| point.0), LEFT + 8.0, WIDTH - RIGHT - 8.0);
        let up = Scale::new(self.is_log, points().map(|point| point.1), HEIGHT - BOTTOM, TOP);
        let mut picture = Picture::new(&self.title, &self.up);
        picture.up_axis(up);
        for tick in across.ticks() {
            let x = across.place(tick);
            picture.text(x, HEIGHT - BOTTOM + 18.0, "middle", "", &short(tick));
        }
        let middle = (LEFT + WIDTH - RIGHT) / 2.0;
        picture.text(middle, HEIGHT - 8.0, "middle", "", &self.across);
        for (at, (_, points)) in self.lines.iter().enumerate() {
            let colour = COLOURS[at % COLOURS.len()];
            let places = points.iter().map(|point| (across.place(point.0), up.place(point.1)));
            let places: Vec<(f64, f64)> = places.collect();
            let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let path = path.join(" ");
            let _ = writeln!(
                picture.0,
                "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
            );
            for (x, y) in places {
                let _ = writeln!(
                    picture.0,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"
                );
            }
        }
        picture.legend(self.lines.iter().map(|(name, _)| name));
        picture.end()
    }
}

impl Bars {
    /// The picture, on a logarithmic scale from 1 below the lowest bar's decade.
    pub fn svg(&self) -> String {
        let heights = || self.groups.iter().flat_map(|(_, bars)| bars.iter().flatten().copied());
        let lowest = heights().filter(|height| *height > 0.0).fold(f64::MAX, f64::min);
        let floor = 10_f64.powf(lowest.min(1e9).log10().floor());
        let up = Scale::new(true, heights().chain([floor]), HEIGHT - BOTTOM, TOP);
        let mut picture = Picture::new(&self.title, &self.up);
        picture.up_axis(up);
        let width = (WIDTH - LEFT - RIGHT) / self.groups.len().max(1) as f64;
        let bar = width * 0.8 / self.names.len().max(1) as f64;
        for (at, (name, bars)) in self.groups.iter().enumerate() {
            let left = LEFT + width * (at as f64 + 0.1);
            picture.text(left + width * 0.4, HEIGHT - BOTTOM + 18.0, "middle", "", name);
            for (at, height) in bars.iter().enumerate() {
                let Some(height) = height.filter(|height| *height > 0.0) else { continue };
                let (x, y) = (left + bar * at as f64, up.place(height));
                let (tall, colour) = (HEIGHT - BOTTOM - y, COLOURS[at % COLOURS.len()]);
                let wide = bar * 0.92;
                let _ = writeln!(
                    picture.0,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{wide:.1}\" height=\"{tall:.1}\" \
                     fill=\"{colour}\"/>"
                );
                let small = "font-size=\"9\"";
                picture.text(x + wide / 2.0, y - 3.0, "middle", small, &short(height));
            }
        }
        picture.legend(self.names.iter());
        picture.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_stand_where_their_values_are() {
        let scale = Scale::new(true, [1.0, 1_000.0].into_iter(), 0.0, 300.0);
        for (value, place) in [(1.0, 0.0), (10.0, 100.0), (100.0, 200.0), (1_000.0, 300.0)] {
            assert!((scale.place(value) - place).abs() < 1e-6, "{value}");
        }
        assert_eq!(Scale::new(false, [10.0].into_iter(), 0.0, 1.0).ticks(), [0.0, 5.0, 10.0]);
        assert_eq!([0.5, 7.0, 1_500.0, 2e7].map(short), ["0.50", "7", "1.5 k", "20 M"]);
    }

    #[test]
    fn pictures_are_whole_whatever_they_show() {
        let lines = |points: Vec<(f64, f64)>| Lines {
            title: "a < b".to_owned(),
            across: "clients".to_owned(),
            up: "ops/s".to_owned(),
            is_log: true,
            lines: vec![("put".to_owned(), points)],
        };
        for points in [vec![], vec![(1.0, 5.0)], vec![(1.0, 0.0), (64.0, 1e6)]] {
            let svg = lines(points.clone()).svg();
            assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert_eq!(svg.matches("<circle").count(), points.len());
        }
        let bars = Bars {
            title: "t".to_owned(),
            up: "ops/s".to_owned(),
            names: vec!["x".to_owned(), "y".to_owned()],
            groups: vec![("A".to_owned(), vec![Some(10.0), None]), ("B".to_owned(), vec![])],
        };
        assert_eq!(bars.svg().matches("<rect").count(), 3, "a bar and the legend's two");
    }
}
