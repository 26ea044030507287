//! Owns tables: columns aligned, headings in capitals, numbers to the right, no borders. Makes text,
//! prints nothing.

/// A column of a table of `T`.
pub struct Column<T> {
    /// In capitals.
    pub title: &'static str,
    /// Numbers stand to the right.
    pub right: bool,
    /// Only in the wide table.
    pub wide: bool,
    /// What stands in a row.
    pub cell: fn(&T) -> String,
}

impl<T> Column<T> {
    /// Of words.
    pub const fn text(title: &'static str, cell: fn(&T) -> String) -> Column<T> {
        Column { title, right: false, wide: false, cell }
    }

    /// Of numbers.
    pub const fn number(title: &'static str, cell: fn(&T) -> String) -> Column<T> {
        Column { title, right: true, wide: false, cell }
    }

    /// Only in the wide table.
    #[must_use]
    pub const fn wide(mut self) -> Column<T> {
        self.wide = true;
        self
    }
}

/// Between two columns.
const GAP: &str = "  ";

/// The table as text, each line with its end. Without items only the headings.
pub fn render<T>(columns: &[Column<T>], items: &[T], wide: bool, headers: bool) -> String {
    let columns: Vec<&Column<T>> = columns.iter().filter(|column| wide || !column.wide).collect();
    let mut rows: Vec<Vec<String>> = Vec::with_capacity(items.len() + 1);
    if headers {
        rows.push(columns.iter().map(|column| column.title.to_owned()).collect());
    }
    let cells = |item| columns.iter().map(|column| (column.cell)(item)).collect();
    rows.extend(items.iter().map(cells));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns.len()).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for ((cell, column), width) in row.iter().zip(&columns).zip(&widths) {
            match column.right {
                true => line.push_str(&format!("{cell:>width$}{GAP}")),
                false => line.push_str(&format!("{cell:<width$}{GAP}")),
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column<(&str, u64)>] = &[
        Column::text("NAME", |item| item.0.to_owned()),
        Column::number("SIZE", |item| item.1.to_string()),
        Column::text("MORE", |item: &(&str, u64)| format!("<{}>", item.0)).wide(),
    ];

    #[test]
    fn columns_are_aligned_and_numbers_stand_to_the_right() {
        let items = [("a", 5), ("größer", 12_345)];
        let expected = "NAME     SIZE\na           5\ngrößer  12345\n";
        assert_eq!(render(COLUMNS, &items, false, true), expected);
    }

    #[test]
    fn wide_has_more_columns_and_headings_can_go() {
        let items = [("a", 5)];
        assert_eq!(render(COLUMNS, &items, true, false), "a  5  <a>\n");
        assert_eq!(render(COLUMNS, &[], true, true), "NAME  SIZE  MORE\n");
    }
}
