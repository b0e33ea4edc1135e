// A board as Grafana draws it: its own theme, panels, lines, figures, bars and tables (@grafana/ui). Heat maps and state
// timelines are plugins of Grafana's server and in no package: they are drawn here, in the colours of the board.
import React, { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { BarGauge, BigValue, GlobalStyles, PanelChrome, PanelContextProvider, ThemeContext, TimeSeries } from '@grafana/ui';
// The table of Grafana 13; the package exports only the one before it.
import { TableNG } from './node_modules/@grafana/ui/dist/esm/components/Table/TableNG/TableNG.mjs';
import '@fontsource/inter/400.css';
import '@fontsource/inter/500.css';
import { createDataFrame, createTheme, dateTime, FieldType, getDisplayProcessor, getValueFormat, formattedValueToString } from '@grafana/data';

const { board, results } = window.given;
const theme = createTheme({ colors: { mode: 'dark' } });
const ROW = 30, GAP = 8, WIDTH = 1600 - 2 * GAP;
const column = (WIDTH + GAP) / 24;
const timeRange = { from: dateTime(results.from * 1000), to: dateTime(results.to * 1000) };
timeRange.raw = { from: timeRange.from, to: timeRange.to };

const nothing = { unsubscribe() {} };
const bus = { publish() {}, subscribe: () => nothing, getStream: () => ({ subscribe: () => nothing, pipe() { return this; } }), removeAllListeners() {}, newScopedBus: () => bus };

const legend = (format, labels) => format.replace(/{{\s*(\w+)\s*}}/g, (_, name) => labels[name] ?? '');

function configOf(panel, name) {
  const config = structuredClone(panel.fieldConfig.defaults);
  config.custom ??= {};
  config.displayName = name;
  for (const { matcher, properties } of panel.fieldConfig.overrides) {
    if (matcher.options !== name) continue;
    for (const { id, value } of properties) {
      if (id.startsWith('custom.')) config.custom[id.slice(7)] = value;
      else if (id !== 'links') config[id] = value;
    }
  }
  return config;
}

// Every series of a panel: its name, and a frame of its values.
function seriesOf(panel) {
  const all = panel.targets.flatMap((target, index) =>
    (results.panels[panel.id][index] ?? []).map((series) => ({ name: legend(target.legendFormat, series.metric), series })));
  // Phases are drawn in their order.
  const order = panel.transformations?.find(({ id }) => id === 'organize')?.options.indexByName;
  if (order) all.sort((a, b) => (order[a.name] ?? 99) - (order[b.name] ?? 99));
  return all.map(({ name, series }, seriesIndex) => {
    const [times, values] = [[], []];
    const known = series.values ?? [[results.to, series.value[1]]];
    const at = new Map(known.map(([time, value]) => [Math.round(time), Number(value)]));
    for (let time = results.from; time <= results.to; time += results.step) {
      const value = at.get(time);
      times.push(time * 1000);
      values.push(Number.isFinite(value) ? value : null);
    }
    const value = { name, type: FieldType.number, values, config: configOf(panel, name) };
    const frame = createDataFrame({ fields: [{ name: 'Time', type: FieldType.time, values: times, config: {} }, value] });
    frame.fields.forEach((field) => {
      const real = field.values.filter((value) => value !== null);
      const [min, max] = [Math.min(...real), Math.max(...real)];
      field.state = { seriesIndex, range: { min, max, delta: max - min } };
      field.display = getDisplayProcessor({ field, theme });
    });
    return { name, frame, labels: series.metric, values, times };
  });
}

const last = (values) => values.findLast((value) => value !== null);

function Stat({ panel, w, h }) {
  const [first] = seriesOf(panel);
  if (!first) return <Empty />;
  const field = first.frame.fields[1];
  field.config.color ??= { mode: 'thresholds' };
  const value = field.display(last(first.values));
  const sparkline = { y: field, x: first.frame.fields[0], timeRange };
  return <BigValue theme={theme} width={w} height={h} value={{ ...value, title: undefined }} sparkline={sparkline} colorMode="value" graphMode="area" justifyMode="auto" textMode="value" />;
}

function Lines({ panel, w, h }) {
  const frames = seriesOf(panel).map((series) => series.frame);
  if (!frames.length) return <Empty />;
  return <TimeSeries frames={frames} structureRev={1} width={w} height={h} timeRange={timeRange} timeZone="utc" legend={panel.options.legend} options={{}} />;
}

function Bars({ panel, w, h }) {
  const all = seriesOf(panel);
  if (!all.length) return <Empty />;
  const max = Math.max(...all.map((series) => last(series.values) ?? 0), 1e-9);
  const each = Math.min(36, Math.floor(h / all.length));
  return <div>{all.map((series) => {
    const field = series.frame.fields[1];
    field.config.max = max;
    const display = getDisplayProcessor({ field, theme });
    return <div key={series.name} style={{ height: each }}><BarGauge theme={theme} width={w} height={each - 4} field={field.config} display={display} value={{ ...display(last(series.values) ?? 0), title: series.name }} orientation="horizontal" displayMode="basic" valueDisplayMode="text" itemSpacing={4} lcdCellWidth={12} alignmentFactors={{ title: 'disconnect', text: '100.00 ms' }} /></div>;
  })}</div>;
}

// The rows of a table: its queries, joined by the label that they share.
function Rows({ panel, w, h }) {
  const rows = new Map();
  const columns = [];
  const name = (index) => panel.targets[index].legendFormat || panel.targets[index].refId;
  panel.targets.forEach((target, index) => {
    for (const { metric, value } of results.panels[panel.id][index] ?? []) {
      const labels = Object.fromEntries(Object.entries(metric).filter(([key]) => key !== '__name__'));
      const key = JSON.stringify(Object.values(labels)[0] ?? '');
      rows.set(key, { ...rows.get(key), ...labels, [`Value #${target.refId}`]: Number(value[1]) });
    }
  });
  const organize = panel.transformations.find(({ id }) => id === 'organize').options;
  const keys = [...new Set([...rows.values()].flatMap(Object.keys))].filter((key) => !organize.excludeByName[key]);
  keys.sort((a, b) => (organize.indexByName[a] ?? 99) - (organize.indexByName[b] ?? 99));
  const fields = keys.map((key) => {
    const shown = organize.renameByName[key] ?? key;
    const values = [...rows.values()].map((row) => row[key] ?? null);
    const type = key.startsWith('Value') ? FieldType.number : FieldType.string;
    return { name: shown, type, values, config: configOf(panel, shown) };
  });
  if (!fields.length) return <Empty />;
  const order = [...rows.values()].map((_, index) => index);
  const by = fields.find((field) => field.type === FieldType.number);
  if (by) order.sort((a, b) => (by.values[b] ?? 0) - (by.values[a] ?? 0));
  // A picture cannot be scrolled: as many rows as fit, the first being the largest.
  order.length = Math.min(order.length, Math.floor(h / 36) - 1);
  fields.forEach((field) => { field.values = order.map((index) => field.values[index]); });
  const frame = createDataFrame({ fields });
  frame.fields.forEach((field) => { field.display = getDisplayProcessor({ field, theme }); field.state = {}; });
  return <TableNG data={frame} width={w} height={h} cellHeight="sm" ariaLabel={panel.title} structureRev={1} />;
}

const formatted = (unit, value) => formattedValueToString(getValueFormat(unit)(value));

function Heat({ panel, w, h }) {
  const all = seriesOf(panel).map((series) => ({ ...series, le: Number(series.labels.le === '+Inf' ? Infinity : series.labels.le) }));
  if (!all.length) return <Empty />;
  all.sort((a, b) => a.le - b.le);
  const rows = all.map((series, index) => ({ le: series.le, values: series.values.map((value, at) => Math.max(0, (value ?? 0) - (index ? all[index - 1].values[at] ?? 0 : 0))) }));
  const [left, bottom] = [64, 20];
  const [width, height] = [w - left, h - bottom];
  const most = Math.max(...rows.flatMap((row) => row.values), 1e-12);
  const [dx, dy] = [width / rows[0].values.length, height / rows.length];
  const shade = (share) => { const t = share ** 0.5; return `rgba(${253 - 40 * (1 - t)}, ${150 - 90 * t}, ${80 - 70 * t}, ${0.15 + 0.85 * t})`; };
  const clock = (time) => new Date(time).toISOString().slice(11, 19);
  return <svg width={w} height={h} style={{ font: '12px Inter, sans-serif' }} fill={theme.colors.text.secondary}>
    {rows.map((row, y) => <g key={row.le}>
      {(rows.length <= 10 || y % 2 === 0) && <text x={left - 6} y={height - (y + 0.5) * dy + 4} textAnchor="end">{row.le === Infinity ? '+Inf' : formatted('s', row.le)}</text>}
      {row.values.map((value, x) => value > 1e-9 && <rect key={x} x={left + x * dx} y={height - (y + 1) * dy} width={Math.max(dx - 1, 1)} height={dy - 1} fill={shade(value / most)} />)}
    </g>)}
    {[0.1, 0.5, 0.9].map((share) => <text key={share} x={left + share * width} y={h - 4} textAnchor="middle">{clock((results.from + share * (results.to - results.from)) * 1000)}</text>)}
  </svg>;
}

function States({ panel, w, h }) {
  const all = seriesOf(panel);
  if (!all.length) return <Empty />;
  const named = panel.fieldConfig.defaults.mappings[0].options;
  const [left, bottom] = [150, 22];
  const each = Math.min(48, (h - bottom) / all.length);
  return <svg width={w} height={h} style={{ font: '12px Inter, sans-serif' }} fill={theme.colors.text.primary}>
    {all.map((series, y) => {
      const bands = [];
      series.values.forEach((value, x) => { if (value !== null) { const end = bands.at(-1); if (end && end.value === value && end.to === x) end.to = x + 1; else bands.push({ value, from: x, to: x + 1 }); } });
      const dx = (w - left) / series.values.length;
      return <g key={series.name}>
        <text x={left - 8} y={y * each + each / 2 + 4} textAnchor="end">{series.name.length > 22 ? series.name.slice(0, 21) + '…' : series.name}</text>
        {bands.map((band) => { const state = named[band.value]; return <g key={band.from}>
          <rect x={left + band.from * dx} y={y * each + 3} width={(band.to - band.from) * dx} height={each - 6} fill={theme.visualization.getColorByName(state?.color ?? 'text')} fillOpacity={0.75} />
          {(band.to - band.from) * dx > 60 && <text x={left + band.from * dx + 6} y={y * each + each / 2 + 4} fill="#fff">{state?.text ?? band.value}</text>}
        </g>; })}
      </g>;
    })}
  </svg>;
}

const Empty = () => <div style={{ display: 'grid', placeItems: 'center', height: '100%', color: theme.colors.text.secondary }}>No data</div>;
const KINDS = { stat: Stat, timeseries: Lines, bargauge: Bars, table: Rows, heatmap: Heat, 'state-timeline': States };

class Guard extends React.Component {
  state = {};
  static getDerivedStateFromError(error) { return { error }; }
  render() { return this.state.error ? <pre style={{ color: 'red' }}>{String(this.state.error.stack).slice(0, 600)}</pre> : this.props.children; }
}

function App() {
  const [drawn, done] = useState(false);
  useEffect(() => { setTimeout(() => done(true), 500); }, []);
  const rows = Math.max(...board.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const top = 44;
  return <ThemeContext.Provider value={theme}><GlobalStyles /><PanelContextProvider value={{ eventsScope: 'x', eventBus: bus }}>
    <div style={{ position: 'relative', width: 1600, height: top + rows * (ROW + GAP) + GAP, background: theme.colors.background.canvas }}>
      <div style={{ padding: '12px 12px', fontSize: 18, color: theme.colors.text.primary }}>{board.title}</div>
      {board.panels.map((panel) => {
        const { x, y, w, h } = panel.gridPos;
        const [width, height] = [w * column - GAP, h * (ROW + GAP) - GAP];
        const Kind = KINDS[panel.type];
        return <div key={panel.id} style={{ position: 'absolute', left: GAP + x * column, top: top + y * (ROW + GAP), width, height }}>
          <PanelChrome title={panel.title} width={width} height={height}>{(w, h) => <Guard><Kind panel={panel} w={w} h={h} /></Guard>}</PanelChrome>
        </div>;
      })}
      {drawn && <div id="drawn" />}
    </div>
  </PanelContextProvider></ThemeContext.Provider>;
}
// Axes are as wide as their labels, which are measured in the font of the theme.
await Promise.all([document.fonts.load('12px Inter'), document.fonts.load('500 12px Inter')]);
createRoot(document.getElementById('root')).render(<App />);
