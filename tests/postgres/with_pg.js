// node-postgres against the server: parameters, types, errors, several statements. Usage: with_pg.js PORT
const assert = require('node:assert');
const { Client } = require('pg');

(async () => {
  const client = new Client({ host: '127.0.0.1', port: Number(process.argv[2]), user: 'any', database: 'thalweg' });
  await client.connect();
  const count = await client.query('SELECT count(*) FROM samples');
  assert.deepStrictEqual(count.rows, [{ count: '180' }]);
  const late = await client.query('SELECT count(*)::int4 AS n FROM samples WHERE ts < $1', [new Date()]);
  assert.strictEqual(late.rows[0].n, 180);
  const row = (await client.query('SELECT ts, value, tags FROM samples WHERE value = $1', [1059])).rows[0];
  assert.ok(row.ts instanceof Date);
  assert.strictEqual(row.value, 1059);
  assert.deepStrictEqual(row.tags, { instance: 'c', job: 'web' });
  const both = await client.query('SELECT 1 AS a; SELECT 2 AS b');
  assert.deepStrictEqual(both.map((r) => r.rows[0]), [{ a: 1 }, { b: 2 }].map((r) => both[0].fields[0].dataTypeID === 20
    ? Object.fromEntries(Object.entries(r).map(([k, v]) => [k, String(v)])) : r));
  await assert.rejects(client.query('SELECT nothing FROM samples'), { code: '42703', position: '8' });
  const named = { name: 'above', text: 'SELECT count(*) AS n FROM samples WHERE value > $1' };
  for (const [least, n] of [[1000, '59'], [100, '119']]) {
    assert.strictEqual((await client.query({ ...named, values: [least] })).rows[0].n, n);
  }
  await client.end();
  console.log('done');
})().catch((e) => { console.error(e); process.exit(1); });
