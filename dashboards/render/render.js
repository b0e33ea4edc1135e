// Pictures of the boards: node render.js DATA [OUT]. DATA is the folder that the tests wrote with BOARD_DATA; with OUT, they
// are PNG files there, to look at.
import { createServer } from 'node:http';
import { readFileSync, mkdirSync, statSync } from 'node:fs';
import { join, extname } from 'node:path';
import { build } from 'vite';
import puppeteer from 'puppeteer-core';

const data = process.argv[2];
const boards = ['overview', 'routes', 'upstreams', 'buffering', 'event-loop', 'process'];
const here = import.meta.dirname;
const dist = join(here, 'node_modules/.pictures');
const out = process.argv[3];
const pictures = out ?? join(here, '../pictures');
mkdirSync(pictures, { recursive: true });

await build({ root: here, base: './', logLevel: 'warn', build: { minify: false, outDir: dist, emptyOutDir: true, chunkSizeWarningLimit: 1e5 } });

const types = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css' };
const server = createServer((request, response) => {
  try {
    const file = join(dist, new URL(request.url, 'http://x').pathname);
    response.setHeader('content-type', types[extname(file)] ?? 'application/octet-stream');
    response.end(readFileSync(file));
  } catch {
    response.writeHead(404).end();
  }
}).listen(0, '127.0.0.1');
await new Promise((listening) => server.once('listening', listening));

const executablePath = process.env.CHROMIUM ?? '/usr/bin/chromium';
const browser = await puppeteer.launch({ executablePath, args: ['--no-sandbox', '--force-color-profile=srgb'] });
for (const name of boards) {
  const page = await browser.newPage();
  page.on('pageerror', (error) => console.error(`${name}: ${error.message}`));
  page.on('console', (said) => said.type() === 'error' && !said.text().includes('404') && console.error(`${name}: ${said.text()}`));
  await page.setViewport({ width: 1600, height: 900 });
  const board = JSON.parse(readFileSync(join(here, `../${name}.json`)));
  const results = JSON.parse(readFileSync(join(data, `${name}.json`)));
  await page.evaluateOnNewDocument((given) => { window.given = given; }, { board, results });
  await page.goto(`http://127.0.0.1:${server.address().port}/index.html`);
  await page.waitForSelector('#drawn', { timeout: 60_000 });
  await new Promise((settled) => setTimeout(settled, 1500));
  const path = join(pictures, `${name}.${out ? 'png' : 'webp'}`);
  await page.screenshot(out ? { path, fullPage: true } : { path, type: 'webp', quality: 80, fullPage: true });
  console.log(`${path} ${Math.round(statSync(path).size / 1024)} KiB`);
  await page.close();
}
await browser.close();
server.close();
