//! The parts of a board, and the classic JSON of Grafana (schema 41) that is generated from them.
//!
//! A board has rows of panels. A panel has a question, a description of its answer, a unit and queries. This module
//! contains all that boards share, such as the data source, the variables, the colours and the interval of rates.

use forebay::metrics::family;
use serde_json::{Map, Value, json};

use super::{colour, query};

/// The format of the files. Grafana migrates it when it loads a file.
const SCHEMA: u32 = 41;

/// Columns of Grafana's grid.
const COLUMNS: u32 = 24;

/// The height of the row of figures at the top of each board.
const STRIP_HEIGHT: u32 = 4;

/// The boards, for links between them: file and title.
pub const BOARDS: [(&str, &str); 6] = [
    ("overview", "Overview"),
    ("routes", "Routes"),
    ("upstreams", "Upstreams"),
    ("buffering", "Buffering and slow clients"),
    ("event-loop", "Event loop"),
    ("process", "Config and process"),
];

/// The permanent address of a board.
pub fn uid(file: &str) -> String {
    format!("forebay-{file}")
}

/// A dashboard.
pub struct Board {
    file: &'static str,
    about: &'static str,
    rows: Vec<(u32, Vec<Panel>)>,
}

impl Board {
    /// An empty board; `file` is one of [`BOARDS`].
    pub fn new(file: &'static str, about: &'static str) -> Board {
        Board { file, about, rows: Vec::new() }
    }

    /// The name of its file, without `.json`.
    pub fn file(&self) -> &'static str {
        self.file
    }

    /// Adds the figures at the top.
    pub fn strip(self, panels: impl Into<Vec<Panel>>) -> Board {
        self.row(STRIP_HEIGHT, panels)
    }

    /// Adds panels side by side; their weights determine their widths.
    pub fn row(mut self, height: u32, panels: impl Into<Vec<Panel>>) -> Board {
        self.rows.push((height, panels.into()));
        self
    }

    /// The file.
    pub fn json(&self) -> Value {
        let mut panels: Vec<Value> = Vec::new();
        let mut top = 0;
        for (height, row) in &self.rows {
            let row: Vec<&Panel> = row.iter().filter(|panel| !panel.queries.is_empty()).collect();
            let total: u32 = row.iter().map(|panel| panel.weight).sum();
            let mut before = 0;
            for panel in &row {
                let left = before * COLUMNS / total;
                before += panel.weight;
                let width = before * COLUMNS / total - left;
                let place = json!({ "h": height, "w": width, "x": left, "y": top });
                panels.push(panel.json(panels.len() + 1, place));
            }
            top += if row.is_empty() { 0 } else { *height };
        }
        let title = BOARDS.iter().find(|(file, _)| *file == self.file).expect("a board of the list").1;
        json!({
            "annotations": { "list": annotations() },
            "description": self.about,
            "editable": false,
            "fiscalYearStartMonth": 0,
            "graphTooltip": 1,
            "links": links(self.file),
            "liveNow": false,
            "panels": panels,
            "refresh": "30s",
            "schemaVersion": SCHEMA,
            "tags": ["forebay"],
            "templating": { "list": variables(&panels) },
            "time": { "from": "now-30m", "to": "now" },
            "timepicker": {},
            "timezone": "",
            "title": format!("Forebay / {title}"),
            "uid": uid(self.file),
            "version": 1,
        })
    }
}

/// A query of a panel.
struct Query {
    expr: String,
    legend: String,
}

/// The type of a panel in Grafana.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Stat,
    TimeSeries,
    Table,
    HeatMap,
    BarGauge,
    StateTimeline,
}

/// A question, and how its answer is shown.
pub struct Panel {
    kind: Kind,
    title: &'static str,
    about: &'static str,
    unit: &'static str,
    weight: u32,
    queries: Vec<Query>,
    defaults: Map<String, Value>,
    custom: Map<String, Value>,
    options: Value,
    overrides: Vec<Value>,
    transformations: Vec<Value>,
}

impl Panel {
    fn new(kind: Kind, title: &'static str, about: &'static str, unit: &'static str, options: Value) -> Panel {
        Panel {
            kind,
            title,
            about,
            unit,
            weight: 1,
            queries: Vec::new(),
            defaults: Map::new(),
            custom: Map::new(),
            options,
            overrides: Vec::new(),
            transformations: Vec::new(),
        }
    }

    /// The last value in large digits, with its history in the background.
    pub fn stat(title: &'static str, about: &'static str, unit: &'static str, expr: &str) -> Panel {
        let options = json!({
            "colorMode": "value", "graphMode": "area", "justifyMode": "auto", "orientation": "auto",
            "percentChangeColorMode": "standard", "showPercentChange": false, "textMode": "value", "wideLayout": true,
            "reduceOptions": { "calcs": ["lastNotNull"], "fields": "", "values": false },
        });
        Panel::new(Kind::Stat, title, about, unit, options).thresholds(&[]).query(expr, title)
    }

    /// Lines over time.
    pub fn lines(title: &'static str, about: &'static str, unit: &'static str) -> Panel {
        let options = json!({
            "legend": { "calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": true },
            "tooltip": { "mode": "multi", "sort": "desc" },
        });
        let custom = json!({
            "drawStyle": "line", "fillOpacity": 8, "gradientMode": "none", "lineInterpolation": "linear",
            "lineWidth": 1, "pointSize": 4, "showPoints": "never", "spanNulls": false, "axisSoftMin": 0,
            "scaleDistribution": { "type": "linear" }, "stacking": { "group": "A", "mode": "none" },
            "thresholdsStyle": { "mode": "off" },
        });
        let mut panel = Panel::new(Kind::TimeSeries, title, about, unit, options);
        panel.custom = object(custom);
        panel.set("color", json!({ "mode": "palette-classic" }))
    }

    /// Stacked areas over time.
    pub fn stack(title: &'static str, about: &'static str, unit: &'static str) -> Panel {
        let mut panel = Panel::lines(title, about, unit);
        panel.custom.insert("fillOpacity".to_owned(), json!(70));
        panel.custom.insert("lineWidth".to_owned(), json!(0));
        panel.custom.insert("stacking".to_owned(), json!({ "group": "A", "mode": "normal" }));
        panel
    }

    /// A heat map of a histogram: the observations of each bucket over time.
    pub fn heat(title: &'static str, about: &'static str, expr: &str) -> Panel {
        let options = json!({
            "calculate": false, "cellGap": 1, "cellValues": { "unit": "short" },
            "color": { "mode": "scheme", "scheme": "Oranges", "fill": "dark-orange", "exponent": 0.5, "steps": 64,
                       "scale": "exponential", "reverse": false },
            "exemplars": { "color": "rgba(255,0,255,0.7)" }, "filterValues": { "le": 1e-9 },
            "legend": { "show": true }, "rowsFrame": { "layout": "auto" }, "showValue": "never",
            "tooltip": { "mode": "single", "showColorScale": false, "yHistogram": true },
            "yAxis": { "axisPlacement": "left", "reverse": false, "unit": "s" },
        });
        let mut panel = Panel::new(Kind::HeatMap, title, about, "s", options);
        panel.custom = object(json!({ "scaleDistribution": { "type": "linear" } }));
        panel.query(expr, "{{le}}")
    }

    /// A table with a row for each value of a label, and a column for each [`Panel::column`].
    pub fn table(title: &'static str, about: &'static str, label: &'static str) -> Panel {
        let options = json!({
            "cellHeight": "sm", "enablePagination": false, "showHeader": true, "sortBy": [],
            "footer": { "countRows": false, "enablePagination": false, "fields": "", "reducer": ["sum"], "show": false },
        });
        let mut panel = Panel::new(Kind::Table, title, about, "short", options);
        panel.custom = object(json!({ "align": "auto", "cellOptions": { "type": "auto" }, "inspect": false }));
        panel.transformations = vec![
            json!({ "id": "merge", "options": {} }),
            json!({ "id": "organize", "options": {
                "excludeByName": { "Time": true }, "indexByName": { label: 0 }, "renameByName": {},
            } }),
        ];
        panel
    }

    /// Horizontal bars of the last values.
    pub fn bars(title: &'static str, about: &'static str, unit: &'static str) -> Panel {
        let options = json!({
            "displayMode": "basic", "orientation": "horizontal", "valueMode": "text", "namePlacement": "auto",
            "showUnfilled": true, "sizing": "auto", "minVizHeight": 16, "minVizWidth": 8, "maxVizHeight": 300,
            "legend": { "calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": false },
            "reduceOptions": { "calcs": ["lastNotNull"], "fields": "", "values": false },
        });
        Panel::new(Kind::BarGauge, title, about, unit, options)
            .set("color", json!({ "mode": "palette-classic" }))
            .set("min", json!(0))
    }

    /// A timeline for each series with the colours of these states: value, name, colour.
    pub fn states(title: &'static str, about: &'static str, states: &[(&str, &str, &str)]) -> Panel {
        let options = json!({
            "alignValue": "left", "mergeValues": true, "rowHeight": 0.8, "showValue": "auto",
            "legend": { "displayMode": "list", "placement": "bottom", "showLegend": true },
            "tooltip": { "mode": "single", "sort": "none" },
        });
        let named: Map<String, Value> = states
            .iter()
            .enumerate()
            .map(|(index, &(value, text, color))| {
                (value.to_owned(), json!({ "color": color, "index": index, "text": text }))
            })
            .collect();
        let mut panel = Panel::new(Kind::StateTimeline, title, about, "short", options);
        panel.custom = object(json!({ "fillOpacity": 75, "lineWidth": 0 }));
        panel
            .set("color", json!({ "mode": "thresholds" }))
            .set("mappings", json!([{ "type": "value", "options": named }]))
    }

    /// The width relative to the neighbours, whose default is 1.
    pub fn wide(mut self, weight: u32) -> Panel {
        self.weight = weight;
        self
    }

    /// Adds a query. The legend is a name or `{{label}}`, and determines the colours.
    ///
    /// A metric that is not declared makes no query, and a panel without queries is not drawn.
    pub fn query(mut self, expr: &str, legend: &str) -> Panel {
        match query::expand(expr) {
            Ok(expr) => self.queries.push(Query { expr, legend: legend.to_owned() }),
            Err(undeclared) if super::AWAITED.contains(&&*undeclared) => return self,
            Err(undeclared) => panic!("the panel {} names {undeclared}, which is not declared", self.title),
        }
        if !matches!(self.kind, Kind::Stat | Kind::Table | Kind::HeatMap) {
            for (name, color) in colour::of(legend) {
                let value = json!({ "fixedColor": color, "mode": "fixed" });
                self.overrides.push(of_series(name, &[("color", value)]));
            }
        }
        self
    }

    /// Adds a query for a limit of the other lines.
    pub fn limit(self, expr: &str) -> Panel {
        let mut panel = self.query(expr, "limit");
        let dashed = json!({ "dash": [10, 10], "fill": "dash" });
        let free = json!({ "group": "limit", "mode": "none" });
        panel.overrides.push(of_series(
            "limit",
            &[
                ("custom.lineStyle", dashed),
                ("custom.fillOpacity", json!(0)),
                ("custom.stacking", free),
                ("custom.lineWidth", json!(1)),
            ],
        ));
        panel
    }

    /// Adds three quantiles of a histogram as lines.
    pub fn percentiles(self, buckets: &str) -> Panel {
        [("p50", "0.5"), ("p90", "0.9"), ("p99", "0.99")].into_iter().fold(self, |panel, (name, quantile)| {
            panel.query(&format!("histogram_quantile({quantile}, sum by (le) (rate({buckets}[R])))"), name)
        })
    }

    /// Adds a column of a table.
    pub fn column(mut self, name: &'static str, unit: &'static str, expr: &str) -> Panel {
        let before = self.queries.len();
        self = self.query(expr, name);
        if self.queries.len() == before {
            return self;
        }
        let field = format!("Value #{}", ref_id(before));
        let organize = &mut self.transformations[1]["options"];
        organize["indexByName"][&field] = json!(before + 1);
        organize["renameByName"][&field] = json!(name);
        self.overrides.push(of_series(name, &[("unit", json!(unit))]));
        self
    }

    /// Adds a query for the labels of a metric, whose value is not used.
    pub fn column_of_labels(mut self, expr: &str) -> Panel {
        let field = format!("Value #{}", ref_id(self.queries.len()));
        self = self.query(expr, "labels");
        self.transformations[1]["options"]["excludeByName"][&field] = json!(true);
        self
    }

    /// Colours the cells of the last column by thresholds, starting with green.
    pub fn column_thresholds(mut self, steps: &[(f64, &str)]) -> Panel {
        let last = self.queries.last().expect("a column").legend.clone();
        self.overrides.push(of_series(
            &last,
            &[("thresholds", thresholds(steps)), ("custom.cellOptions", json!({ "type": "color-text" }))],
        ));
        self
    }

    /// Links the values of a column to a board with details, by the variable of the same name.
    pub fn drill_down(mut self, label: &'static str, board: &'static str) -> Panel {
        let title = BOARDS.iter().find(|(file, _)| *file == board).expect("a board").1;
        let url = format!(
            "/d/{}?var-datasource=${{datasource}}&${{job:queryparam}}&${{instance:queryparam}}&var-{label}=${{__value.text}}&${{__url_time_range}}",
            uid(board)
        );
        let link = json!([{ "title": format!("{title}: ${{__value.text}}"), "url": url }]);
        self.overrides.push(of_series(label, &[("links", link)]));
        self
    }

    /// Sorts a table by a column, largest first.
    pub fn sorted_by(mut self, column: &'static str) -> Panel {
        self.options["sortBy"] = json!([{ "desc": true, "displayName": column }]);
        self
    }

    /// Colours values by thresholds, starting with green.
    pub fn thresholds(self, steps: &[(f64, &str)]) -> Panel {
        let first = if steps.is_empty() { colour::NEUTRAL } else { colour::GOOD };
        let mut made = thresholds(steps);
        made["steps"][0]["color"] = json!(first);
        self.set("thresholds", made).set("color", json!({ "mode": "thresholds" }))
    }

    /// The least maximum of the axis, so that a zero is drawn at the bottom and not in the middle.
    pub fn at_least(mut self, value: f64) -> Panel {
        self.custom.insert("axisSoftMax".to_owned(), json!(value));
        self
    }

    /// The maximum of the axis.
    pub fn max(self, max: f64) -> Panel {
        self.set("max", json!(max))
    }

    /// Sorts phases in the order of an exchange instead of alphabetically.
    pub fn in_order_of_phases(mut self) -> Panel {
        use forebay::phase::Phase;
        let mut order = Map::from_iter([("Time".to_owned(), json!(0))]);
        order.extend(Phase::ALL.iter().map(|phase| (phase.name().to_owned(), json!(phase.index() + 1))));
        self.transformations = vec![
            json!({ "id": "joinByField", "options": { "byField": "Time", "mode": "outer" } }),
            json!({ "id": "organize", "options": { "excludeByName": {}, "indexByName": order, "renameByName": {} } }),
        ];
        self
    }

    fn set(mut self, key: &str, value: Value) -> Panel {
        self.defaults.insert(key.to_owned(), value);
        self
    }

    fn json(&self, id: usize, place: Value) -> Value {
        let mut defaults = self.defaults.clone();
        defaults.insert("unit".to_owned(), json!(self.unit));
        if !self.custom.is_empty() {
            defaults.insert("custom".to_owned(), Value::Object(self.custom.clone()));
        }
        let targets: Vec<Value> = self.queries.iter().enumerate().map(|(n, query)| self.target(n, query)).collect();
        let mut panel = json!({
            "datasource": datasource(),
            "description": self.about,
            "fieldConfig": { "defaults": defaults, "overrides": self.overrides },
            "gridPos": place,
            "id": id,
            "options": self.options,
            "targets": targets,
            "title": self.title,
            "type": match self.kind {
                Kind::Stat => "stat",
                Kind::TimeSeries => "timeseries",
                Kind::Table => "table",
                Kind::HeatMap => "heatmap",
                Kind::BarGauge => "bargauge",
                Kind::StateTimeline => "state-timeline",
            },
        });
        if !self.transformations.is_empty() {
            panel["transformations"] = json!(self.transformations);
        }
        panel
    }

    fn target(&self, number: usize, query: &Query) -> Value {
        let instant = matches!(self.kind, Kind::Table | Kind::BarGauge);
        let format = match self.kind {
            Kind::Table => "table",
            Kind::HeatMap => "heatmap",
            _ => "time_series",
        };
        let mut target = json!({
            "datasource": datasource(),
            "editorMode": "code",
            "expr": query.expr,
            "format": format,
            "instant": instant,
            "legendFormat": query.legend,
            "range": !instant,
            "refId": ref_id(number),
        });
        if instant {
            // Grafana calculates rates over four times this interval, so over some minutes.
            target["interval"] = json!("1m");
        }
        target
    }
}

/// The letter of a query in Grafana.
fn ref_id(number: usize) -> char {
    char::from(b'A' + u8::try_from(number).expect("less than 26 queries"))
}

fn object(value: Value) -> Map<String, Value> {
    let Value::Object(map) = value else { unreachable!("{value} is no object") };
    map
}

fn datasource() -> Value {
    json!({ "type": "prometheus", "uid": "${datasource}" })
}

fn thresholds(steps: &[(f64, &str)]) -> Value {
    let mut made = vec![json!({ "color": colour::GOOD, "value": null })];
    made.extend(steps.iter().map(|(value, color)| json!({ "color": color, "value": value })));
    json!({ "mode": "absolute", "steps": made })
}

/// Settings for the series or column with this name.
fn of_series(name: &str, properties: &[(&str, Value)]) -> Value {
    let properties: Vec<Value> = properties.iter().map(|(id, value)| json!({ "id": id, "value": value })).collect();
    json!({ "matcher": { "id": "byName", "options": name }, "properties": properties })
}

/// A vertical line on all panels when a process started.
fn annotations() -> Vec<Value> {
    let expr = query::expand("process_start_time_seconds").expect("a metric that the process has");
    vec![json!({
        "datasource": datasource(),
        "enable": true,
        "expr": format!("{expr} * 1000"),
        "hide": false,
        "iconColor": colour::NEUTRAL,
        "name": "Starts",
        "step": "60s",
        "tagKeys": "instance",
        "titleFormat": "Forebay started",
        "useValueForTime": "on",
    })]
}

/// Links to the other boards, with the time range and the variables of this one.
fn links(from: &str) -> Vec<Value> {
    let others = BOARDS.iter().filter(|(file, _)| *file != from);
    others
        .map(|(file, title)| {
            json!({
                "asDropdown": false, "icon": "dashboard", "includeVars": true, "keepTime": true, "tags": [],
                "targetBlank": false, "title": title, "tooltip": "", "type": "link", "url": format!("/d/{}", uid(file)),
            })
        })
        .collect()
}

/// All variables on all boards, so that links keep their values. A variable that no query uses is hidden.
fn variables(panels: &[Value]) -> Vec<Value> {
    let text = json!(panels).to_string().replace("\\\"", "\"");
    let mut made = vec![json!({
        "current": {}, "hide": 0, "includeAll": false, "label": "Data source", "multi": false, "name": "datasource",
        "options": [], "query": "prometheus", "refresh": 1, "regex": "", "skipUrlSync": false, "type": "datasource",
    })];
    for (name, label, of, all) in [
        ("job", "Job", family::BUILD_INFO.name.to_owned(), ""),
        ("instance", "Instance", format!("{}{{job=~\"$job\"}}", family::BUILD_INFO.name), ""),
        (
            "route",
            "Route",
            query::expand("forebay_exchanges_total").expect("declared").replace(",route=~\"$route\"", ""),
            ".*",
        ),
        (
            "upstream",
            "Upstream",
            query::expand("forebay_upstream_connects_total").expect("declared").replace(",upstream=~\"$upstream\"", ""),
            ".*",
        ),
    ] {
        let values = format!("label_values({of}, {name})");
        let shown = query::variables(&text).any(|used| used == name);
        let mut variable = json!({
            "current": { "selected": true, "text": ["All"], "value": ["$__all"] },
            "datasource": datasource(), "definition": values, "hide": if shown { 0 } else { 2 }, "includeAll": true,
            "label": label, "multi": true, "name": name, "options": [], "refresh": 2, "regex": "",
            "query": { "qryType": 1, "query": values, "refId": "PrometheusVariableQueryEditor-VariableQuery" },
            "skipUrlSync": false, "sort": 1, "type": "query",
        });
        // Series without one of these labels are included. A job must be one of Forebay, so `All` lists them.
        if !all.is_empty() {
            variable["allValue"] = json!(all);
        }
        made.push(variable);
    }
    made
}
