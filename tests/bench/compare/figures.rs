//! Computes the table from samples: medians over the rounds, and ratios to the base proxy. Pure.

use serde_json::{Value, json};

/// One kind of work, measured with several proxies in turn, in rounds.
pub struct Comparison {
    /// The name of the cell on the command line.
    pub cell: String,
    /// A description of the work.
    pub title: String,
    /// The figures of each sample.
    pub columns: &'static [Column],
    /// The row that the others are compared with.
    pub base: usize,
    /// One row per proxy.
    pub rows: Vec<Row>,
    /// Forebay's goals.
    pub goals: &'static [Goal],
}

/// A figure.
pub struct Column {
    /// Its name in JSON, unit last.
    pub key: &'static str,
    /// Its name in the table.
    pub heading: &'static str,
    /// Number of decimals in the table.
    pub decimals: usize,
    /// Whether a ratio is meaningful.
    pub compared: bool,
}

/// The results of one proxy.
pub struct Row {
    /// The proxy.
    pub name: String,
    /// The figures of each round, one per column.
    pub samples: Vec<Vec<f64>>,
    /// Whether its goals are checked. Those of other proxies are only shown.
    pub judged: bool,
}

/// An upper bound for a figure.
pub struct Goal {
    /// A description of the figure.
    pub what: &'static str,
    /// The key of the column.
    pub column: &'static str,
    /// The name of the row to divide by. `None`: the figure itself is bounded.
    pub over: Option<&'static str>,
    /// The required bound.
    pub must: f64,
    /// The desired bound.
    pub aim: Option<f64>,
}

/// The result of comparing a figure with its goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Above the required bound.
    Missed,
    /// Within the required bound.
    Met,
    /// Within the desired bound.
    Aimed,
}

impl Goal {
    /// Compares a figure with the bounds.
    pub fn verdict(&self, figure: f64) -> Verdict {
        match figure {
            aimed if self.aim.is_some_and(|aim| aimed <= aim) => Verdict::Aimed,
            met if met <= self.must => Verdict::Met,
            _ => Verdict::Missed,
        }
    }
}

impl Verdict {
    /// The name in the table and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Missed => "MISSED",
            Verdict::Met => "met",
            Verdict::Aimed => "met, aim too",
        }
    }
}

/// A ratio to the base: the median of the rounds' ratios, and their range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// The median.
    pub median: f64,
    /// The minimum over the rounds.
    pub lowest: f64,
    /// The maximum over the rounds.
    pub highest: f64,
}

impl Comparison {
    /// The median of a column over the rounds.
    pub fn median(&self, row: usize, column: usize) -> Option<f64> {
        median(self.rows[row].samples.iter().map(|round| round[column]).collect())
    }

    /// The ratio of a row to the base in a column. Rounds are compared one by one, so that noise longer than a round
    /// affects both sides. `None` without rounds, or if the base is 0.
    pub fn ratio(&self, row: usize, column: usize) -> Option<Ratio> {
        self.ratio_to(self.base, row, column)
    }

    fn ratio_to(&self, base: usize, row: usize, column: usize) -> Option<Ratio> {
        let rounds = self.rows[row].samples.iter().zip(&self.rows[base].samples);
        let ratios: Vec<f64> = rounds.map(|(ours, base)| ours[column] / base[column]).collect();
        let lowest = ratios.iter().copied().reduce(f64::min)?;
        let highest = ratios.iter().copied().reduce(f64::max)?;
        let ratio = Ratio { median: median(ratios)?, lowest, highest };
        (ratio.lowest.is_finite() && ratio.highest.is_finite()).then_some(ratio)
    }

    /// The figure of a goal. `None` without rounds, or if the row to divide by is missing.
    pub fn figure(&self, goal: &Goal, row: usize) -> Option<f64> {
        let column = self.columns.iter().position(|column| column.key == goal.column)?;
        let Some(over) = goal.over else { return self.median(row, column).filter(|it| it.is_finite()) };
        let base = self.rows.iter().position(|row| row.name == over)?;
        self.ratio_to(base, row, column).map(|ratio| ratio.median)
    }

    /// The table: each figure followed by its ratio to the base; the first ratio has its range.
    pub fn table(&self) -> String {
        let mut heading = vec![String::new()];
        for column in self.columns {
            heading.push(column.heading.to_owned());
            if column.compared {
                heading.push("ratio".to_owned());
            }
        }
        let mut lines = vec![heading];
        lines.extend((0..self.rows.len()).map(|row| self.line(row)));
        format!("{}; ratios to {}\n{}", self.title, self.rows[self.base].name, aligned(&lines))
    }

    fn line(&self, row: usize) -> Vec<String> {
        let mut words = vec![self.rows[row].name.clone()];
        for (index, column) in self.columns.iter().enumerate() {
            // A figure that does not apply to a row is NaN.
            let value = self.median(row, index).filter(|value| value.is_finite());
            words.push(value.map_or("-".to_owned(), |value| format!("{value:.*}", column.decimals)));
            if !column.compared {
                continue;
            }
            words.push(match self.ratio(row, index) {
                None => "-".to_owned(),
                Some(ratio) if index > 0 || row == self.base => format!("{:.2}", ratio.median),
                Some(Ratio { median, lowest, highest }) => format!("{median:.2} [{lowest:.2}-{highest:.2}]"),
            });
        }
        words
    }

    /// The medians, the ratios and all samples.
    pub fn json(&self) -> Value {
        let named = |figure: &dyn Fn(usize) -> Value| -> Value {
            self.columns.iter().enumerate().map(|(i, column)| (column.key.to_owned(), figure(i))).collect()
        };
        let rows = self.rows.iter().enumerate().map(|(index, row)| {
            let samples: Vec<Value> = row.samples.iter().map(|round| named(&|column| json!(round[column]))).collect();
            let ratio = |column: usize| {
                self.ratio(index, column).map(|r| json!({"median": r.median, "lowest": r.lowest, "highest": r.highest}))
            };
            json!({
                "name": row.name,
                "median": named(&|column| json!(self.median(index, column))),
                "ratio": named(&|column| json!(ratio(column).filter(|_| self.columns[column].compared))),
                "rounds": samples,
            })
        });
        let goals = self.goals.iter().map(|goal| {
            let figures = self.rows.iter().enumerate().map(|(index, row)| {
                let figure = self.figure(goal, index);
                let verdict = figure.filter(|_| row.judged).map(|figure| goal.verdict(figure).name());
                (row.name.clone(), json!({"figure": figure, "verdict": verdict}))
            });
            let figures: Value = figures.collect();
            json!({"what": goal.what, "over": goal.over, "must": goal.must, "aim": goal.aim, "figures": figures})
        });
        json!({
            "cell": self.cell,
            "title": self.title,
            "goals": goals.collect::<Vec<_>>(),
            "base": self.rows[self.base].name,
            "rows": rows.collect::<Vec<_>>(),
        })
    }
}

/// The first column's ratios of all comparisons, one line each, as a summary of the run.
pub fn summary(comparisons: &[Comparison]) -> String {
    let lines = comparisons.iter().flat_map(|comparison| {
        let others = (0..comparison.rows.len()).filter(|&row| row != comparison.base);
        others.map(|row| {
            let ratio = comparison.ratio(row, 0).map_or("-".to_owned(), |ratio| format!("{:.2}", ratio.median));
            let what = format!("{}, {}", comparison.title, comparison.columns[0].heading);
            let whom = format!("{} to {}", comparison.rows[row].name, comparison.rows[comparison.base].name);
            vec![what, whom, ratio]
        })
    });
    aligned(&lines.collect::<Vec<_>>())
}

/// One line per goal: the bound, Forebay's figure and verdict, and the figures of the others.
pub fn verdicts(comparisons: &[Comparison]) -> String {
    let lines = comparisons.iter().flat_map(|comparison| {
        comparison.goals.iter().map(|goal| {
            let aim = goal.aim.map_or(String::new(), |aim| format!(", aim {aim}"));
            let mut line = vec![format!("{}: {}", comparison.cell, goal.what), format!("<= {}{aim}", goal.must)];
            line.extend(comparison.rows.iter().enumerate().map(|(index, row)| {
                let figure = comparison.figure(goal, index);
                let written = figure.map_or("-".to_owned(), |figure| format!("{figure:.2}"));
                match figure.filter(|_| row.judged) {
                    Some(figure) => format!("{} {written} {}", row.name, goal.verdict(figure).name()),
                    None => format!("{} {written}", row.name),
                }
            }));
            line
        })
    });
    aligned(&lines.collect::<Vec<_>>())
}

/// Aligns columns to their longest word: the first to the left, the others to the right.
fn aligned(lines: &[Vec<String>]) -> String {
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|word| word.len()).max();
    let mut text = String::new();
    for line in lines {
        for (column, word) in line.iter().enumerate() {
            let width = width(column).unwrap_or(0);
            text += &if column == 0 { format!("  {word:<width$}") } else { format!("  {word:>width$}") };
        }
        text += "\n";
    }
    text
}

/// The middle value, or the mean of the two middle ones.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}
